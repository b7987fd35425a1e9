use super::*;
use crate::methods::Method;
use crate::prepare::ExpertConfig;

/// A model of this shape, cut as by default. `shape` is hidden size, FFN width, layers, heads, key and value heads and
/// vocabulary.
fn model([hidden_size, width, layers, heads, kv_heads, vocab_size]: [usize; 6], tied: bool) -> ModelConfig {
    let json = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
    });
    let dense = ModelConfig::from_json(&json).unwrap();
    let section = ExpertConfig::default().options(&dense, 0).unwrap().section(&dense);
    ModelConfig { dynamoe: Some(section), ..dense }
}

fn added() -> TrainConfig {
    TrainConfig { train: Trained::Added, batch_size: 4, recompute: true, ..TrainConfig::default() }
}

#[test]
fn what_is_not_trained_has_no_gradient_and_no_moments() {
    let config = model([64, 192, 4, 4, 2, 500], true);
    let all = Memory::of(&config, &TrainConfig::default(), 4, None);
    assert_eq!((all.state, all.calibrating), (3 * all.weights, 0));
    assert!(all.teacher > 0);
    let added =
        Memory::of(&config, &TrainConfig { train: Trained::Added, ..TrainConfig::default() }, 2, None);
    let trained = 12 * numbers(&added_tensors(&config), |_| true);
    assert_eq!((added.weights, added.teacher, added.state), (all.weights, 0, trained));
    let routers =
        Memory::of(&config, &TrainConfig { train: Trained::Routers, ..TrainConfig::default() }, 2, None);
    assert!(routers.state < added.state);
    let dense =
        Memory::of(&config, &TrainConfig { method: Method::Dense, ..TrainConfig::default() }, 2, None);
    assert!(dense.teacher == 0 && dense.state < all.state);
}

#[test]
fn ranks_share_moments_and_the_sum_of_gradients() {
    let config = model([64, 192, 4, 4, 2, 500], true);
    let train = TrainConfig { micro_batch: Some(2), ..TrainConfig::default() };
    let state = |train: &TrainConfig, ranks| Memory::of_rank(&config, train, 4, None, ranks).state;
    let trained = state(&TrainConfig::default(), 1) / 12;
    assert_eq!((state(&train, 1), state(&train, 2)), (16 * trained, 10 * trained));
}

#[test]
fn options_are_named_until_the_training_fits() {
    let config = model([64, 192, 4, 4, 2, 500], true);
    let need = |train: &TrainConfig| Memory::of(&config, train, 2, None).peak();
    let train = TrainConfig { batch_size: 64, ..TrainConfig::default() };
    let with = |change: fn(&mut TrainConfig)| {
        let mut train = train.clone();
        change(&mut train);
        need(&train)
    };
    let recompute = with(|train| train.recompute = true);
    let both = with(|train| {
        train.recompute = true;
        train.train = Trained::Added;
    });
    let half = with(|train| {
        train.recompute = true;
        train.train = Trained::Added;
        train.micro_batch = Some(32);
    });
    assert!(need(&train) > recompute && recompute > both && both > half);
    let found = |available| options_that_fit(&train, available, need);
    assert_eq!(found(recompute), Some(("--recompute".into(), recompute)));
    assert_eq!(found(recompute - 1), Some(("--recompute --train added".into(), both)));
    assert_eq!(found(both - 1), Some(("--recompute --train added --micro-batch 32".into(), half)));
    let (least, _) = found(PROGRAM + (5 << 20)).unwrap();
    assert!(least.contains("--micro-batch 1 --moment-bits 8 --sequence-length"), "{least}");
    assert_eq!(found(PROGRAM), None);
}

/// The models of the tables in docs/training.md.
fn documented() -> [(&'static str, ModelConfig); 3] {
    [
        ("SmolLM2-135M", model([576, 1536, 30, 9, 3, 49152], true)),
        ("Llama-3.2-1B", model([2048, 8192, 16, 32, 8, 128_256], true)),
        ("Mistral-7B", model([4096, 14336, 32, 32, 8, 32000], false)),
    ]
}

#[track_caller]
fn assert_documented(row: &str) {
    let documentation = include_str!("../../../../../docs/training.md");
    assert!(documentation.contains(row), "docs/training.md has no row {row}");
}

#[test]
fn large_models_need_what_the_documentation_says() {
    for (name, config) in documented() {
        let training = |train: &TrainConfig| bytes(Memory::of(&config, train, 2, None).training());
        let all = TrainConfig { batch_size: 4, ..TrainConfig::default() };
        let small = TrainConfig { moment_bits: MomentBits::Bits8, ..all.clone() };
        let settings = [&all, &small, &TrainConfig { train: Trained::Added, ..all.clone() }, &added()];
        let [all, small, kept, least] = settings.map(training);
        assert_documented(&format!("| {name} | {all} | {small} | {kept} | {least} |"));
    }
}

/// The sum of gradients and the updated weights, of the trained numbers that a process does not keep.
#[test]
fn processes_send_what_the_documentation_says() {
    for (name, config) in documented() {
        let mut row = format!("| {name} |");
        for train in [TrainConfig::default(), added()] {
            let trained = numbers(&expected_tensors(&config), |name| is_trained(name, &train, true));
            let sent = |ranks: u64| bytes(8 * trained * (ranks - 1) / ranks);
            row += &format!(" {} million | {} | {} |", trained / 1_000_000, sent(2), sent(8));
        }
        assert_documented(&row);
    }
}
