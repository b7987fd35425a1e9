//! Text that a model writes itself, by the demo's base: it has learned day reports, and ends each with its BOS.

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dynamoe_model::{Checkpoint, RoutedModel};
use moefy_train::data::{DataSource, OwnText, TextFormat, TextOptions, Texts};
use moefy_train::train::TrainConfig;
use moefy_train::writing::{Plan, plan, write};
use serde_json::Value;
use tempfile::TempDir;

/// Chat templates: the first ends a turn with a token, the second a question with a word.
const TOKENS: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}";
const WORDS: &str = "{% for m in messages %}{% if m.role == 'user' %}Day{{ m.content }} So {% else %}{{ m.content }}<|endoftext|>{% endif %}{% endfor %}";

/// A model, and a folder to write to.
struct Writer {
    dir: TempDir,
    model: RoutedModel,
    texts: Texts,
}

impl Writer {
    fn new(template: Option<&str>) -> Self {
        Self::with(template, TextFormat::default())
    }

    fn with(template: Option<&str>, format: TextFormat) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo/base");
        fs::create_dir(dir.path().join("base")).unwrap();
        for entry in fs::read_dir(base).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), dir.path().join("base").join(entry.file_name())).unwrap();
        }
        if let Some(template) = template {
            fs::write(dir.path().join("base/chat_template.jinja"), template).unwrap();
        }
        let checkpoint = Checkpoint::open(&dir.path().join("base")).unwrap();
        let options = TextOptions { format, cache_dir: Some(dir.path().join("cache")) };
        let texts = Texts::open(&checkpoint, &options).unwrap();
        Self { model: RoutedModel::load(&checkpoint, &Device::Cpu).unwrap(), texts, dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn plan(&self, tokens: u64, sequence_length: usize, answers_only: bool) -> Plan {
        self.try_plan(tokens, sequence_length, answers_only).unwrap()
    }

    fn try_plan(&self, tokens: u64, sequence_length: usize, answers_only: bool) -> anyhow::Result<Plan> {
        let train = TrainConfig { sequence_length, seed: 3, ..TrainConfig::default() };
        plan(OwnText { tokens: Some(tokens) }, &train, answers_only, &self.texts, self.model.config())
    }

    /// Writes a text under this name; its bytes.
    fn write(&self, name: &str, plan: &Plan) -> Vec<u8> {
        write(&self.model, &self.texts, plan, &self.path(name)).unwrap();
        assert!(!self.path(&format!("{name}.partial")).exists());
        fs::read(self.path(name)).unwrap()
    }

    fn records(&self, name: &str, plan: &Plan) -> Vec<Value> {
        let text = String::from_utf8(self.write(name, plan)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Tokens of a text as training reads it.
    fn tokens(&self, name: &str) -> u64 {
        let source = DataSource { own: Some(OwnText { tokens: None }), ..DataSource::local(self.path(name)) };
        self.texts.tokens(&source).unwrap().len() as u64
    }
}

fn string<'a>(record: &'a Value, field: &str) -> &'a str {
    record[field].as_str().unwrap_or_else(|| panic!("no {field:?} in {record}"))
}

#[test]
fn a_model_writes_what_it_has_learned() {
    let writer = Writer::new(None);
    let plan = writer.plan(20_000, 512, false);
    let records = writer.records("a.jsonl", &plan);
    // the reader may put other tokens in the place of some
    let found = writer.tokens("a.jsonl");
    assert!((20_000..20_000 + 512).contains(&found), "{found}");
    assert!(records.iter().enumerate().all(|(number, record)| record["document"] == number));
    let texts: Vec<&str> = records.iter().map(|record| string(record, "text")).collect();
    let whole = texts.iter().filter(|text| text.starts_with("Day ") && text.contains(" So ended day "));
    // the others go astray: the model was trained on shorter sequences
    assert!(whole.count() > texts.len() / 5, "{}", texts.join("\n\n"));
    assert!(texts.iter().all(|text| text.starts_with("Day ")), "{}", texts.join("\n\n"));
    assert!(texts.iter().all(|text| !text.contains("<|endoftext|>")));
    let mut different = texts.clone();
    different.sort_unstable();
    different.dedup();
    assert_eq!(different.len(), texts.len());
}

/// Wherever a text was cut, within a line or between groups, it becomes what it was to be.
#[test]
fn a_text_that_was_cut_goes_on_to_the_same_bits() {
    for (template, answers_only) in [(None, false), (Some(TOKENS), false), (Some(TOKENS), true)] {
        let writer = Writer::new(template);
        let plan = writer.plan(5_000, 256, answers_only);
        let whole = writer.write("whole.jsonl", &plan);
        assert!(whole == writer.write("again.jsonl", &plan));
        let other = Plan { seed: 4, ..plan.clone() };
        assert!(whole != writer.write("other.jsonl", &other));
        let lines: Vec<usize> = (0..whole.len()).filter(|&at| whole[at] == b'\n').collect();
        let middle = lines[lines.len() / 2];
        for cut in [0, 1, lines[0], lines[0] + 1, middle - 20, middle + 1, whole.len() - 1, whole.len()] {
            let name = format!("cut{cut}.jsonl");
            fs::write(writer.path(&format!("{name}.partial")), &whole[..cut]).unwrap();
            assert!(whole == writer.write(&name, &plan), "cut at {cut} of {}", whole.len());
        }
        // a disk that lost what was written last
        let mut torn = whole[..middle].to_vec();
        torn.extend([0; 100]);
        fs::write(writer.path("torn.jsonl.partial"), torn).unwrap();
        assert!(whole == writer.write("torn.jsonl", &plan));
    }
}

#[test]
fn half_of_a_chat_models_documents_are_conversations() {
    let writer = Writer::new(Some(TOKENS));
    let records = writer.records("a.jsonl", &writer.plan(12_000, 512, false));
    let (mut answered, mut open) = (0, 0);
    for record in &records {
        let number = record["document"].as_u64().unwrap();
        if number % 2 == 1 || record["text"].is_string() {
            // a question that was not ended before the sequence was is a text, too
            open += u64::from(number.is_multiple_of(2));
            assert_eq!(number % 2 == 0, string(record, "text").starts_with("user:"), "{record}");
            continue;
        }
        let (prompt, completion) = (string(record, "prompt"), string(record, "completion"));
        let question =
            prompt.strip_prefix("user:").and_then(|rest| rest.strip_suffix("<|endoftext|>\nassistant:"));
        assert!(question.is_some_and(|question| !question.is_empty()), "{record}");
        assert!(!completion.is_empty() && !completion.contains("<|endoftext|>"), "{record}");
        answered += 1;
    }
    assert!(answered > 5, "{answered} answered, {open} open of {}", records.len());
}

#[test]
fn a_question_may_end_with_a_word() {
    let writer = Writer::new(Some(WORDS));
    let records = writer.records("a.jsonl", &writer.plan(12_000, 512, false));
    let conversations: Vec<&Value> = records.iter().filter(|record| record["prompt"].is_string()).collect();
    assert!(conversations.len() > 5, "{records:?}");
    for record in conversations {
        let (prompt, completion) = (string(record, "prompt"), string(record, "completion"));
        let question = prompt.strip_prefix("Day").and_then(|rest| rest.strip_suffix("So"));
        assert!(question.is_some_and(|question| !question.contains("So")), "{record}");
        assert!(!completion.is_empty(), "{record}");
    }
}

#[test]
fn answers_alone_need_conversations() {
    let masked = || TextFormat { mask_prompt: true, field: Some("body".into()), ..TextFormat::default() };
    let writer = Writer::with(Some(TOKENS), masked());
    let records = writer.records("a.jsonl", &writer.plan(6_000, 512, true));
    assert!(records.iter().all(|record| record["prompt"].is_string() && record["completion"].is_string()));
    // the field of other text is not looked for in this one
    assert!(writer.tokens("a.jsonl") >= 6_000);

    let error = Writer::with(None, masked()).try_plan(6_000, 512, true).unwrap_err();
    assert!(error.to_string().contains("no chat template"), "{error}");
    let refuses = "{{ raise_exception('system messages only') }}";
    let error = Writer::with(Some(refuses), masked()).try_plan(6_000, 512, true).unwrap_err();
    assert!(format!("{error:#}").contains("system messages only"), "{error:#}");
    let error = writer.try_plan(6_000, 12, true).unwrap_err();
    assert!(error.to_string().contains("--sequence-length 12 leaves fewer than 8"), "{error:#}");
}

/// Questions that no sequence is long enough for.
#[test]
fn a_model_that_never_answers_is_given_up() {
    let template = TOKENS.replace("<|endoftext|>\n", "<never>\n");
    let writer = Writer::new(Some(&template));
    let plan = writer.plan(100, 40, true);
    // without its own row, BOS is never among the likely ones
    let checkpoint = Checkpoint::open(&writer.path("base")).unwrap();
    let model = RoutedModel::from_tensors(checkpoint.config(), &mut |name, shape| {
        let tensor = checkpoint.tensor(name, shape, DType::F32, &Device::Cpu)?;
        if name != "model.embed_tokens.weight" {
            return Ok(tensor);
        }
        let (rows, width) = tensor.dims2()?;
        let zeros = Tensor::zeros((1, width), DType::F32, &Device::Cpu)?;
        Ok(Tensor::cat(&[&zeros, &tensor.narrow(0, 1, rows - 1)?], 0)?)
    })
    .unwrap();
    let error = write(&model, &writer.texts, &plan, &writer.path("a.jsonl")).unwrap_err().to_string();
    assert!(error.contains("1024 documents") && error.contains("--sequence-length"), "{error}");
    assert!(!writer.path("a.jsonl").exists());
}

#[test]
fn a_template_that_cannot_be_used_leaves_plain_documents() {
    for template in
        ["{{ raise_exception('no') }}", "{{ messages | length }}", "{{ messages[0].content | upper }}"]
    {
        let writer = Writer::new(Some(template));
        let records = writer.records("a.jsonl", &writer.plan(2_000, 128, false));
        assert!(records.iter().all(|record| record["text"].is_string()), "{template}");
    }
}

#[test]
fn a_plan_fits_the_model_and_the_training() {
    let writer = Writer::new(None);
    for length in [0, 1, 513] {
        let error = writer.try_plan(100, length, false).unwrap_err().to_string();
        assert!(error.contains("--sequence-length") && error.contains("512 positions"), "{error}");
    }
    let train = TrainConfig { tokens: 10_001, ..TrainConfig::default() };
    let plan = plan(OwnText { tokens: None }, &train, false, &writer.texts, writer.model.config());
    assert_eq!(plan.unwrap().tokens, 2_501);
}
