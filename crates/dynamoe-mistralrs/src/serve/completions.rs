//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::sync::Arc;

use axum::{
    body::Bytes,
    extract::State,
    response::{IntoResponse, Response},
};
use mistralrs_core::Constraint;
use serde_json::Value;

use super::{
    App,
    adaptive::default_request,
    answer::{self, Asked, Form, Head},
    error::{ApiError, ApiResult},
    language::{Conversation, Language},
    metrics::Watch,
    request::{self, Body, Prompt, Rules, at_most, dial_of, refused},
    run::{Job, Place},
};
use crate::PhaseDials;

/// `POST /v1/chat/completions`.
pub(super) async fn chat(State(app): State<App>, body: Bytes) -> ApiResult<Response> {
    let mut body: Body = request::parse(&body)?;
    body.for_chat()?;
    let messages = body.take_messages()?;
    let mut rules = request::rules(&mut body, &app.limits, app.place.language.vocabulary(), true)?;
    let mut tools = request::tool_use(&mut body)?;
    if let Some(schema) = tools.forced.take() {
        if !matches!(rules.constraint, Constraint::None) {
            return Err(refused("tool_choice", "give a form of the answer or have a tool called, not both"));
        }
        rules.constraint = Constraint::JsonSchema(schema);
    }
    let messages =
        messages.into_iter().enumerate().map(|(n, message)| message.into_json(&format!("messages[{n}]")));
    let messages = messages.collect::<ApiResult<Vec<Value>>>()?;
    let text = |message: &Value| message["content"].as_str().map_or(0, str::len);
    app.limits.prompt("messages", messages.iter().map(text).sum())?;
    let conversation =
        Conversation { messages, tools: tools.tools.clone(), variables: variables(&mut body)? };
    let prompt = app
        .read(move |language| {
            let template = language.template().ok_or_else(|| {
                refused(
                    "messages",
                    "the model has no chat template; give one with --chat-template, or use /v1/completions",
                )
            })?;
            let text = template.render(conversation).map_err(|error| refused("messages", error))?;
            // the template has written the special tokens
            language.tokens(&text, false).map_err(|error| refused("messages", error))
        })
        .await?;
    let tags = app.place.language.think_tags();
    let thinking = tags.map(|tags| tags.ends_in_thoughts(&prompt));
    let form = Form::Chat { tools, thinking };
    Prepared { form, prompts: vec![prompt], rules, prompt_field: "messages", default_tokens: None }
        .ask(app, body)
        .await
}

/// `POST /v1/completions`.
pub(super) async fn text(State(app): State<App>, body: Bytes) -> ApiResult<Response> {
    let mut body: Body = request::parse(&body)?;
    body.for_text()?;
    let rules = request::rules(&mut body, &app.limits, app.place.language.vocabulary(), false)?;
    let prompt = body.prompt.take().ok_or_else(|| {
        refused(
            "prompt",
            "expected a string, a list of strings, a list of token ids or a list of such lists, found none",
        )
    })?;
    let echo = body.echo.unwrap_or(false);
    let limits = app.limits;
    let (prompts, texts) = app
        .read(move |language| {
            let (prompts, texts) = prompts(language, prompt, &limits)?;
            let texts =
                texts.unwrap_or_else(|| prompts.iter().map(|prompt| language.text_of(prompt)).collect());
            Ok((prompts, texts))
        })
        .await?;
    let form = Form::Text { echo: echo.then_some(texts) };
    Prepared { form, prompts, rules, prompt_field: "prompt", default_tokens: Some(16) }.ask(app, body).await
}

/// Variables of a chat's template.
fn variables(body: &mut Body) -> ApiResult<serde_json::Map<String, Value>> {
    let mut variables = body.chat_template_kwargs.take().unwrap_or_default();
    if let Some(thinking) = body.enable_thinking {
        variables.insert("enable_thinking".into(), thinking.into());
    }
    if let Some(effort) = body.reasoning_effort.take() {
        if !["none", "minimal", "low", "medium", "high"].contains(&effort.as_str()) {
            let why = format!("expected none, minimal, low, medium or high, found {effort:?}");
            return Err(refused("reasoning_effort", why));
        }
        variables.insert("reasoning_effort".into(), effort.into());
    }
    Ok(variables)
}

type Tokens = Vec<Vec<u32>>;

/// The tokens of all prompts, and their texts if those were given.
fn prompts(
    language: &Language,
    prompt: Prompt,
    limits: &request::Limits,
) -> ApiResult<(Tokens, Option<Vec<String>>)> {
    let texts = match prompt {
        Prompt::Text(text) => vec![text],
        Prompt::Texts(texts) => texts,
        Prompt::Tokens(tokens) if tokens.is_empty() => Vec::new(),
        Prompt::Tokens(tokens) => return Ok((known(language, vec![tokens])?, None)),
        Prompt::ManyTokens(many) => return Ok((known(language, many)?, None)),
    };
    limits.prompt("prompt", texts.iter().map(String::len).sum())?;
    let tokens = |text: &String| language.tokens(text, true).map_err(|error| refused("prompt", error));
    Ok((texts.iter().map(tokens).collect::<ApiResult<_>>()?, Some(texts)))
}

fn known(language: &Language, prompts: Tokens) -> ApiResult<Tokens> {
    let most = language.vocabulary();
    match prompts.iter().flatten().find(|&&token| token as usize >= most) {
        Some(token) => {
            Err(refused("prompt", format_args!("expected ids of tokens, below {most}, found {token}")))
        }
        None => Ok(prompts),
    }
}

/// A request whose prompts are tokens.
struct Prepared {
    form: Form,
    prompts: Tokens,
    rules: Rules,
    /// The field that errors about the prompt name.
    prompt_field: &'static str,
    /// Tokens of an answer where nothing is said of it.
    default_tokens: Option<usize>,
}

impl Prepared {
    /// Checks the rest of a request, and answers it.
    async fn ask(mut self, app: App, mut body: Body) -> ApiResult<Response> {
        let model = body.model.take().unwrap_or_else(|| "default".into());
        let dials = dials(&app, &model, &body)?;
        let told = app.limits.choices("n", body.n)?;
        let choices =
            body.best_of.map_or(Ok(told), |best_of| app.limits.choices("best_of", Some(best_of)))?;
        let streamed = body.stream.unwrap_or(false);
        if choices < told {
            return Err(refused("best_of", format_args!("expected at least n, {told}, found {choices}")));
        }
        if choices > told && streamed {
            return Err(refused(
                "best_of",
                "the best of several is known only when all are told: leave out stream",
            ));
        }
        let max_tokens = max_tokens(&app, &body, &self, choices)?;
        let tells_logprobs = self.rules.logprobs.is_some();
        if choices > told {
            self.rules.logprobs.get_or_insert(0);
        }
        let seat = app.seats.take(self.prompts.len() * choices)?;
        let kind = if matches!(self.form, Form::Chat { .. }) { "chatcmpl" } else { "cmpl" };
        let head = Head::new(kind, model);
        let shown = dials.map_or("default".into(), |dials| format!("{dials:?}"));
        let watch = Watch::new(&app.metrics, &head.id, &head.model, shown);
        let asked = Asked {
            head,
            jobs: jobs(&app, self.prompts, self.rules, (choices, &max_tokens), dials)?,
            place: app.place.clone(),
            choices,
            told,
            form: self.form,
            include_usage: body.include_usage(),
            tells_logprobs,
            logits_bytes: app.limits.logits_bytes,
            model: app.model.clone(),
            watch,
            _seat: seat,
        };
        if streamed {
            return answer::stream(asked).await;
        }
        let watch = Arc::clone(&asked.watch);
        let answered = answer::whole(asked).await;
        if let Err(error) = &answered {
            watch.refused(error.status.as_u16());
        }
        answered.map(|answer| axum::Json(answer).into_response())
    }
}

/// The dial of a request, in its body or in the name of its model; none if it brings none.
fn dials(app: &App, model: &str, body: &Body) -> ApiResult<Option<PhaseDials>> {
    let named = app.names.dial(model)?;
    let Some(loaded) = &app.model else {
        let field =
            body.sensitivity.is_some().then_some("sensitivity").or(body.budget.is_some().then_some("budget"));
        return match field {
            Some(field) => Err(refused(field, "the model is dense: it takes neither sensitivity nor budget")),
            None => Ok(None),
        };
    };
    let thinks = body.sensitivity.or(body.budget).is_some_and(|field| field.sets_thinking());
    if thinks && app.place.language.think_tags().is_none() {
        let field = if body.sensitivity.is_some() { "sensitivity" } else { "budget" };
        return Err(refused(&format!("{field}.thinking"), "the model has no think tags"));
    }
    match (named, dial_of(body.sensitivity, body.budget, loaded.dial())?) {
        (Some(_), Some(_)) => {
            Err(refused("model", "give the dial in the model's name or in the body, not both"))
        }
        (named, told) => Ok(told.or(named.map(PhaseDials::from))),
    }
}

/// Tokens that each prompt's answers may have: what was asked for, cut to what the context leaves.
fn max_tokens(app: &App, body: &Body, prepared: &Prepared, choices: usize) -> ApiResult<Vec<usize>> {
    let asked = match (body.max_tokens, body.max_completion_tokens) {
        (Some(one), Some(other)) if one != other => {
            let why = format!("{other} contradicts max_tokens, {one}");
            return Err(refused("max_completion_tokens", why));
        }
        (one, other) => one.or(other),
    };
    let prompts = &prepared.prompts;
    if prompts.is_empty() {
        return Err(refused(prepared.prompt_field, "expected at least one prompt, found none"));
    }
    let (context, most) = (app.place.language.context, app.limits.answer_tokens / (choices * prompts.len()));
    let left = |prompt: &Vec<u32>| {
        let found = prompt.len();
        if found == 0 {
            return Err(refused(prepared.prompt_field, "has 0 tokens, must have at least 1"));
        }
        // where nothing is to be written, the prompt may fill the context
        let may = if asked == Some(0) { context } else { context.saturating_sub(1) };
        if found > may {
            return Err(refused(prepared.prompt_field, format_args!("has {found} tokens, may have {may}")));
        }
        let left = context - found;
        let wanted =
            asked.map(|asked| usize::try_from(asked).unwrap_or(usize::MAX)).or(prepared.default_tokens);
        let tokens = wanted.map_or(left.min(most), |wanted| wanted.min(left));
        at_most("max_tokens", tokens as u64, most as u64, " for each of all answers (--max-answer-tokens)")?;
        Ok(tokens)
    };
    prompts.iter().map(left).collect()
}

fn jobs(
    app: &App,
    prompts: Tokens,
    rules: Rules,
    (choices, max_tokens): (usize, &[usize]),
    dials: Option<PhaseDials>,
) -> ApiResult<Vec<Job>> {
    let rules = Arc::new(rules);
    let mut jobs = Vec::with_capacity(choices * prompts.len());
    for (prompt, &max_tokens) in prompts.into_iter().zip(max_tokens) {
        let prompt: Arc<[u32]> = prompt.into();
        for number in 0..choices as u64 {
            let dial = app.model.as_ref().map(|model| match dials {
                Some(dials) => model.request_by_phase(dials).map_err(ApiError::bad_request),
                None => Ok(default_request(app.adaptive, model)),
            });
            let dial = dial.transpose()?;
            jobs.push(Job {
                prompt: Arc::clone(&prompt),
                rules: Arc::clone(&rules),
                dial,
                max_tokens,
                number,
            });
        }
    }
    Ok(jobs)
}

impl App {
    /// Does something that takes time with the model's language.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Language) -> ApiResult<T> + Send + 'static,
    ) -> ApiResult<T> {
        let Place { language, .. } = self.place.clone();
        // few at a time: whoever sends the longest texts leaves a core to others
        let turn = Arc::clone(&self.readers).acquire_owned().await.map_err(ApiError::internal)?;
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&language)
        });
        done.await.map_err(ApiError::internal)?
    }
}
