"""A session with a running dynamoe-serve through the openai package: python client.py [URL]"""

import sys

from openai import BadRequestError, OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
client = OpenAI(base_url=f"{url}/v1", api_key="not needed")


def say(sensitivity, stream=False):
    # fields that OpenAI's API does not have travel in extra_body
    return client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Tell me a story."}],
        max_tokens=24,
        temperature=0,
        stream=stream,
        extra_body={"sensitivity": sensitivity},
    )


for sensitivity in (0.0, 0.5, 1.0):
    answer = say(sensitivity)
    width = answer.usage.model_extra["mean_ffn_width"]
    print(f"sensitivity {sensitivity}: mean FFN width {width:.3f}: {answer.choices[0].message.content!r}")

chunks = list(say(0.5, stream=True))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
print(f"streamed: mean FFN width {chunks[-1].usage.model_extra['mean_ffn_width']:.3f}: {text!r}")

try:
    say(2.0)
except BadRequestError as error:
    print(f"refused: {error.body['message']}")
