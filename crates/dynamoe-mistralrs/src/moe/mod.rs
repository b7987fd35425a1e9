//! The dial of ordinary MoE models: how many of its experts a token runs.
//!
//! An MoE layer chooses `K` experts for a token, with weights `w_1 ≥ w_2 ≥ … ≥ w_K`. At sensitivity `s` the token runs the
//! experts with
//!
//! ```text
//! w_k ≥ (1 - s) · w_1
//! ```
//!
//! So at sensitivity 1 it runs all of them, which is the model as it is; at 0 it runs the first one; and a higher
//! sensitivity never runs fewer. A budget is the mean share of the `K` experts, and a [table](budgets) turns it into a
//! sensitivity. Nothing is trained, and the model's files stay as they are.
//!
//! Where the model normalizes the weights of its experts (`norm_topk_prob`), those that remain are scaled to the sum that
//! all had. Otherwise they stay as they are. Shared experts always run.

pub mod budgets;
#[cfg(feature = "serve")]
pub mod solve;

use anyhow::{Context, Result};
use mistralrs_core::{
    MixtralLoader,
    plugin::{
        DeepSeekV2Loader, DeepSeekV3Loader, GLM4MoeLiteLoader, GLM4MoeLoader, NormalModelLoader,
        Qwen3MoELoader, Qwen3NextLoader,
    },
};
use serde_json::Value;

/// The experts of a model, as its config.json has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeExperts {
    /// `architectures[0]`.
    pub architecture: String,
    /// Experts of an MoE layer.
    pub experts: usize,
    /// `K`, the experts that a token runs at sensitivity 1.
    pub experts_per_token: usize,
}

impl MoeExperts {
    /// Reads config.json. Nothing if the architecture has no dial for its experts, or the model has no experts.
    ///
    /// # Errors
    /// A number of experts that is no whole number from 1 up.
    pub(crate) fn read(config: &Value) -> Result<Option<Self>> {
        let architecture = config.pointer("/architectures/0").and_then(Value::as_str);
        let Some(architecture) = architecture.filter(|name| loader(name).is_some()) else { return Ok(None) };
        let count = |key: &str| {
            let Some(value) = config.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
            let count =
                value.as_u64().filter(|&count| count > 0).and_then(|count| usize::try_from(count).ok());
            let expected = || format!("config.json: {key:?} must be a whole number from 1 up, found {value}");
            count.map(Some).with_context(expected)
        };
        let mut experts = None;
        for key in ["num_experts", "n_routed_experts", "num_local_experts"] {
            experts = experts.or(count(key)?);
        }
        let both = experts.zip(count("num_experts_per_tok")?);
        Ok(both.map(|(experts, experts_per_token)| Self {
            architecture: architecture.to_owned(),
            experts,
            experts_per_token,
        }))
    }
}

/// config.json as mistral.rs's own loaders read it. transformers 5 moves the keys of rotary embeddings together, renames
/// others, and leaves out what its code takes for granted.
pub(crate) fn for_engine(mut config: Value) -> Value {
    let absent = |config: &Value, key: &str| config.get(key).is_none_or(Value::is_null);
    let rope = config.get("rope_parameters").cloned().unwrap_or_default();
    for key in ["rope_theta", "partial_rotary_factor"] {
        if absent(&config, key)
            && let Some(value) = rope.get(key)
        {
            config[key] = value.clone();
        }
    }
    let scaled = rope.get("rope_type").is_some_and(|kind| kind != "default");
    if scaled && absent(&config, "rope_scaling") {
        config["rope_scaling"] = rope;
    }
    let of = |key: &str| config.get(key).cloned().unwrap_or_default();
    let implied = match config["architectures"][0].as_str() {
        Some("Qwen3MoeForCausalLM") => {
            vec![("num_experts", of("num_local_experts")), ("max_window_layers", of("num_hidden_layers"))]
        }
        Some("DeepseekV2ForCausalLM") => vec![("n_group", 1.into()), ("topk_group", 1.into())],
        Some("DeepseekV3ForCausalLM") => {
            vec![("scoring_func", "sigmoid".into()), ("topk_method", "noaux_tc".into())]
        }
        _ => Vec::new(),
    };
    for (key, value) in implied {
        if absent(&config, key) {
            config[key] = value;
        }
    }
    config
}

/// Makes one of mistral.rs's own loaders.
pub(crate) type MoeLoader = fn() -> Box<dyn NormalModelLoader>;

/// mistral.rs's own loader of an architecture whose experts have a dial.
pub(crate) fn loader(architecture: &str) -> Option<MoeLoader> {
    Some(match architecture {
        "Qwen3MoeForCausalLM" => || Box::new(Qwen3MoELoader),
        "Qwen3NextForCausalLM" => || Box::new(Qwen3NextLoader),
        "DeepseekV2ForCausalLM" => || Box::new(DeepSeekV2Loader),
        "DeepseekV3ForCausalLM" => || Box::new(DeepSeekV3Loader),
        "Glm4MoeForCausalLM" => || Box::new(GLM4MoeLoader),
        "Glm4MoeLiteForCausalLM" => || Box::new(GLM4MoeLiteLoader),
        "MixtralForCausalLM" => || Box::new(MixtralLoader),
        _ => return None,
    })
}

/// How many experts a token runs. `weights (K)` are those of its experts, largest first.
pub(crate) fn experts_to_run(weights: &[f32], sensitivity: f64) -> usize {
    let Some(&first) = weights.first() else { return 0 };
    let threshold = (1.0 - sensitivity) * f64::from(first);
    weights.iter().take_while(|&&weight| f64::from(weight) >= threshold).count().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};
    use serde_json::json;

    #[test]
    fn a_token_runs_the_experts_that_reach_the_threshold() {
        let weights = [0.4, 0.2, 0.1, 0.0];
        for (sensitivity, experts) in
            [(1.0, 4), (0.99, 3), (0.76, 3), (0.74, 2), (0.51, 2), (0.49, 1), (0.0, 1)]
        {
            assert_eq!(experts_to_run(&weights, sensitivity), experts, "{sensitivity}");
        }
        // a tie with the first
        assert_eq!(experts_to_run(&[0.5, 0.5, 0.1], 0.0), 2);
        assert_eq!(experts_to_run(&[f32::NAN, 0.1], 0.5), 1);
        assert_eq!(experts_to_run(&[0.3], 0.5), 1);
    }

    #[test]
    fn a_higher_sensitivity_never_runs_fewer_experts() {
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        for _ in 0..1000 {
            let count = rng.random_range(1..12);
            let mut weights: Vec<f32> = (0..count).map(|_| rng.random::<f32>()).collect();
            weights.sort_by(|a, b| b.total_cmp(a));
            let mut sensitivities: Vec<f64> = (0..20).map(|_| rng.random()).collect();
            sensitivities.extend([0.0, 1.0]);
            sensitivities.sort_by(f64::total_cmp);
            let runs: Vec<usize> = sensitivities.iter().map(|&s| experts_to_run(&weights, s)).collect();
            assert!(runs.is_sorted(), "{weights:?} {runs:?}");
            assert_eq!((runs[0] >= 1, runs[runs.len() - 1]), (true, count));
        }
    }

    #[test]
    fn what_transformers_leaves_out_is_filled_in() {
        let config = json!({
            "architectures": ["DeepseekV3ForCausalLM"], "scoring_func": null, "topk_method": "greedy",
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
        });
        let found = for_engine(config);
        assert_eq!((&found["rope_theta"], &found["rope_scaling"]["factor"]), (&json!(500.0), &json!(4.0)));
        assert_eq!((&found["scoring_func"], &found["topk_method"]), (&json!("sigmoid"), &json!("greedy")));
        let config = json!({
            "architectures": ["DeepseekV2ForCausalLM"], "n_group": null, "rope_theta": 7.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}
        });
        let found = for_engine(config);
        assert_eq!((&found["n_group"], &found["rope_theta"]), (&json!(1), &json!(7.0)));
        assert_eq!(found.get("rope_scaling"), None);
    }

    #[test]
    fn experts_are_read_from_config_json() {
        let read = |json: Value| MoeExperts::read(&json);
        let qwen =
            json!({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "num_experts_per_tok": 8});
        let expected =
            MoeExperts { architecture: "Qwen3MoeForCausalLM".into(), experts: 128, experts_per_token: 8 };
        assert_eq!(read(qwen).unwrap(), Some(expected));
        let dense = json!({"architectures": ["DeepseekV2ForCausalLM"], "n_routed_experts": null});
        assert_eq!(read(dense).unwrap(), None);
        assert_eq!(read(json!({"architectures": ["LlamaForCausalLM"], "num_experts": 8})).unwrap(), None);
        let wrong = json!({"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 0});
        let error = read(wrong).unwrap_err().to_string();
        assert!(error.contains("num_experts_per_tok") && error.contains("found 0"), "{error}");
    }
}
