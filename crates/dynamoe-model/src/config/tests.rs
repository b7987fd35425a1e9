//! What keys of config.json mean.

use super::*;
use serde_json::json;

/// Only what no default can stand in for, and `keys`.
fn parse(architecture: &str, keys: Value) -> Result<ModelConfig> {
    let mut config = json!({
        "architectures": [architecture], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 32,
    });
    for (key, value) in keys.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(&config)
}

#[test]
fn absent_keys_take_the_architectures_defaults() {
    let llama = parse("LlamaForCausalLM", json!({})).unwrap();
    assert_eq!((llama.head_dim, llama.num_key_value_heads, llama.rope_theta), (16, 4, 10_000.0));
    assert_eq!((llama.max_position_embeddings, llama.rms_norm_eps), (2048, 1e-6));
    assert_eq!(
        (llama.qkv_bias, llama.o_bias, llama.qk_norm, llama.tie_word_embeddings),
        (false, false, false, false)
    );
    assert_eq!(llama.sliding_window, [None; 4]);
    assert_eq!((llama.bos_token_id, llama.eos_token_ids), (None, vec![]));

    let mistral = parse("MistralForCausalLM", json!({ "head_dim": null })).unwrap();
    assert_eq!((mistral.head_dim, mistral.sliding_window), (16, vec![Some(4096); 4]));

    let qwen2 = parse("Qwen2ForCausalLM", json!({ "sliding_window": 8 })).unwrap();
    assert_eq!((qwen2.head_dim, qwen2.qkv_bias, qwen2.o_bias), (16, true, false));
    assert_eq!(qwen2.sliding_window, [None; 4], "use_sliding_window is off");

    let qwen3 = parse("Qwen3ForCausalLM", json!({})).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias), (128, true, false));

    let smollm3 = parse("SmolLM3ForCausalLM", json!({ "sliding_window": 8 })).unwrap();
    assert_eq!((smollm3.rope_theta, smollm3.tie_word_embeddings), (2e6, true));
    assert_eq!(smollm3.rotary_layers, [true, true, true, false]);
    assert_eq!(smollm3.sliding_window, [None; 4], "use_sliding_window is off");

    let gemma = parse("GemmaForCausalLM", json!({})).unwrap();
    assert_eq!((gemma.head_dim, gemma.max_position_embeddings, gemma.tie_word_embeddings), (256, 8192, true));
    assert_eq!((gemma.norm_offset, gemma.output_norms, gemma.hidden_act), (1.0, false, HiddenAct::GeluTanh));
    assert_eq!(gemma.scales, Scales { embedding: 8.0, ..Scales::plain(256) });

    let gemma2 = parse("Gemma2ForCausalLM", json!({})).unwrap();
    assert_eq!(
        (gemma2.norm_offset, gemma2.output_norms, gemma2.hidden_act),
        (1.0, true, HiddenAct::GeluTanh)
    );
    assert_eq!(gemma2.sliding_window, [Some(4096), None, Some(4096), None]);
    let caps = Scales { attention_cap: Some(50.0), logit_cap: Some(30.0), ..gemma.scales };
    assert_eq!(gemma2.scales, Scales { attention: 1.0 / 16.0, ..caps });

    let gemma3 = parse("Gemma3ForCausalLM", json!({ "sliding_window_pattern": 3 })).unwrap();
    assert_eq!((gemma3.rope_theta, gemma3.local_rope_theta, gemma3.qk_norm), (1e6, Some(1e4), true));
    assert_eq!(gemma3.sliding_window, [Some(4096), Some(4096), None, Some(4096)]);
    assert_eq!(gemma3.scales, Scales { attention: 1.0 / 16.0, ..gemma.scales });
    assert_eq!(gemma2.local_rope_theta, None);

    let granite = parse("GraniteForCausalLM", json!({})).unwrap();
    assert_eq!(granite.scales, Scales { attention: 1.0, ..Scales::plain(16) });
}

#[test]
fn activations_have_a_key_each_and_one_may_be_called_by_two_names() {
    let act = |architecture: &str, key: &str, name: &str| {
        parse(architecture, json!({ key: name })).map(|config| config.hidden_act)
    };
    assert_eq!(act("LlamaForCausalLM", "hidden_act", "gelu_pytorch_tanh").unwrap(), HiddenAct::GeluTanh);
    assert_eq!(act("GemmaForCausalLM", "hidden_act", "silu").unwrap(), HiddenAct::Silu);
    // Gemma's first configurations
    assert_eq!(act("GemmaForCausalLM", "hidden_act", "gelu").unwrap(), HiddenAct::GeluTanh);
    assert_eq!(act("Gemma2ForCausalLM", "hidden_activation", "swish").unwrap(), HiddenAct::Silu);
    assert_eq!(act("Gemma2ForCausalLM", "hidden_act", "silu").unwrap(), HiddenAct::GeluTanh, "not its key");
    for (architecture, key) in
        [("LlamaForCausalLM", "hidden_act"), ("Gemma2ForCausalLM", "hidden_activation")]
    {
        let error = act(architecture, key, "gelu").unwrap_err().to_string();
        assert!(
            error.contains(key) && error.contains("gelu_pytorch_tanh") && error.contains("\"gelu\""),
            "{error}"
        );
    }
}

#[test]
fn the_section_names_the_activation_of_the_base() {
    let section = |version: u32, keys: Value| {
        let mut section = json!({
            "version": version, "base_architecture": "GemmaForCausalLM", "base_model_type": "gemma",
            "expert_widths": [48, 96], "router": { "kind": "static", "hidden_size": 0 }, "sensitivity": 0.5,
        });
        section.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let keys = json!({ "architectures": ["DynaMoeForCausalLM"], "dynamoe": section });
        parse("DynaMoeForCausalLM", keys)
    };
    let error = |found: Result<ModelConfig>| format!("{:#}", found.unwrap_err());
    let gelu = json!({ "hidden_act": "gelu_pytorch_tanh" });
    assert_eq!(section(3, gelu.clone()).unwrap().hidden_act, HiddenAct::GeluTanh);
    let other = error(section(3, json!({})));
    assert!(other.contains("\"silu\"") && other.contains("\"gelu_pytorch_tanh\""), "{other}");
    let older = error(section(2, gelu));
    assert!(older.contains("hidden_act needs version 3") && older.contains("found version 2"), "{older}");
}

#[test]
fn factors_and_caps_are_the_keys_of_their_architectures() {
    let keys = json!({
        "query_pre_attn_scalar": 64, "attn_logit_softcapping": null, "final_logit_softcapping": 5.0,
        "embedding_multiplier": 12.0, "attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 8,
    });
    let scales = |architecture| parse(architecture, keys.clone()).unwrap().scales;
    let gemma2 = Scales { embedding: 8.0, attention: 0.125, logit_cap: Some(5.0), ..Scales::plain(256) };
    assert_eq!(scales("Gemma2ForCausalLM"), gemma2);
    let granite =
        Scales { embedding: 12.0, attention: 0.25, residual: 0.5, logits: 0.125, ..Scales::plain(16) };
    assert_eq!(scales("GraniteForCausalLM"), granite);
    assert_eq!(scales("LlamaForCausalLM"), Scales::plain(16));
    let zero = parse("GraniteForCausalLM", json!({ "logits_scaling": 0 })).unwrap_err().to_string();
    assert!(zero.contains("logits_scaling") && zero.contains("above 0"), "{zero}");
}

#[test]
fn rotary_embeddings_may_be_left_out_in_layers() {
    let layers = |keys: Value| parse("SmolLM3ForCausalLM", keys).map(|config| config.rotary_layers);
    assert_eq!(layers(json!({ "no_rope_layer_interval": 2 })).unwrap(), [true, false, true, false]);
    let list = json!({ "no_rope_layers": [0, 1, 1, 0, 7], "no_rope_layer_interval": 2 });
    assert_eq!(layers(list).unwrap(), [false, true, true, false]);
    let llama = parse("LlamaForCausalLM", json!({ "no_rope_layers": [0, 0, 0, 0] })).unwrap();
    assert_eq!(llama.rotary_layers, [true; 4], "a key of another architecture");
    for wrong in [json!([1, 1]), json!("all"), json!([1, 1, "one", 1])] {
        let error = layers(json!({ "no_rope_layers": wrong })).unwrap_err().to_string();
        assert!(error.contains("no_rope_layers") && error.contains("each of the 4 layers"), "{error}");
    }
}

#[test]
fn attention_bias_covers_the_output_projection() {
    for (architecture, expected) in [
        ("LlamaForCausalLM", true),
        ("Qwen3ForCausalLM", true),
        ("SmolLM3ForCausalLM", true),
        ("Gemma2ForCausalLM", true),
        ("GraniteForCausalLM", true),
        ("MistralForCausalLM", false),
    ] {
        let config = parse(architecture, json!({ "attention_bias": true })).unwrap();
        assert_eq!((config.qkv_bias, config.o_bias), (expected, expected), "{architecture}");
    }
}

#[test]
fn windows_belong_to_layers() {
    let windows = |architecture, keys| parse(architecture, keys).unwrap().sliding_window;
    assert_eq!(windows("MistralForCausalLM", json!({ "sliding_window": 8 })), [Some(8); 4]);
    assert_eq!(windows("MistralForCausalLM", json!({ "sliding_window": null })), [None; 4]);
    let qwen = json!({ "use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2 });
    assert_eq!(windows("Qwen2ForCausalLM", qwen), [None, None, Some(8), Some(8)]);
    let types = json!(["full_attention", "sliding_attention", "full_attention", "sliding_attention"]);
    let listed = json!({ "layer_types": types, "sliding_window": 8, "use_sliding_window": true });
    assert_eq!(windows("Qwen3ForCausalLM", listed.clone()), [None, Some(8), None, Some(8)]);
    let of_gemma2 = json!({ "layer_types": types, "sliding_window": 8 });
    assert_eq!(windows("Gemma2ForCausalLM", of_gemma2), [None, Some(8), None, Some(8)]);
    let of_smollm3 =
        json!({ "sliding_window": 8, "use_sliding_window": true, "no_rope_layers": [0, 1, 0, 1] });
    assert_eq!(windows("SmolLM3ForCausalLM", of_smollm3), [Some(8), None, Some(8), None]);
    assert_eq!(windows("GemmaForCausalLM", listed.clone()), [None; 4]);
    // these two do not read the key
    assert_eq!(windows("MistralForCausalLM", listed.clone()), [Some(8); 4]);
    assert_eq!(windows("LlamaForCausalLM", listed), [None; 4]);
    let off = json!({ "layer_types": types, "sliding_window": 8 });
    let error = parse("Qwen3ForCausalLM", off).unwrap_err();
    assert!(error.to_string().contains("\"use_sliding_window\" is not true"), "{error}");
    let off = json!({ "sliding_window": null, "layer_types": types });
    let error = parse("Gemma2ForCausalLM", off).unwrap_err().to_string();
    assert!(error.ends_with("\"sliding_window\" is not set"), "{error}");
    let error = parse("Qwen2ForCausalLM", json!({ "layer_types": ["full_attention"] })).unwrap_err();
    assert!(error.to_string().contains("each of the 4 layers"), "{error}");
}

#[test]
fn rope_is_read_from_old_and_new_keys() {
    let rope = |keys| {
        let config = parse("LlamaForCausalLM", keys).unwrap();
        (config.rope_theta, config.rope_scaling)
    };
    assert_eq!(rope(json!({ "rope_scaling": null, "rope_theta": 5e5 })), (5e5, None));
    assert_eq!(
        rope(json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } })),
        (1e4, Some(RopeScaling::Linear(2.0)))
    );
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 5e5
    });
    let expected = Llama3Rope {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    assert_eq!(
        rope(json!({ "rope_parameters": llama3 })),
        (5e5, Some(RopeScaling::Llama3(expected.clone())))
    );
    assert_eq!(
        rope(json!({ "rope_scaling": llama3, "rope_theta": 1e6 })),
        (5e5, Some(RopeScaling::Llama3(expected)))
    );
    assert_eq!(
        rope(json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 7.0 } })),
        (7.0, None)
    );
}

#[test]
fn layers_with_a_window_may_have_angles_of_their_own() {
    let rope = |keys| {
        let config = parse("Gemma3ForCausalLM", keys)?;
        Ok::<_, anyhow::Error>((config.rope_theta, config.rope_scaling, config.local_rope_theta))
    };
    let older = json!({ "rope_theta": 5e5, "rope_local_base_freq": 7.0, "rope_scaling": { "type": "linear", "factor": 8.0 } });
    assert_eq!(rope(older).unwrap(), (5e5, Some(RopeScaling::Linear(8.0)), Some(7.0)));
    let sections = |sliding: Value| {
        let full = json!({ "rope_type": "linear", "factor": 8.0, "rope_theta": 5e5 });
        rope(json!({ "rope_parameters": { "full_attention": full, "sliding_attention": sliding } }))
    };
    let plain = json!({ "rope_type": "default", "rope_theta": 7.0 });
    assert_eq!(sections(plain).unwrap(), (5e5, Some(RopeScaling::Linear(8.0)), Some(7.0)));
    let error = format!("{:#}", sections(json!({ "rope_type": "linear", "factor": 2.0 })).unwrap_err());
    assert!(error.contains("sliding_attention") && error.contains("\"default\""), "{error}");
}

#[test]
fn of_two_sections_of_rope_the_older_name_wins() {
    let rope = |keys| {
        let config = parse("LlamaForCausalLM", keys).unwrap();
        (config.rope_theta, config.rope_scaling)
    };
    let newer = json!({ "rope_type": "default", "rope_theta": 7.0 });
    let linear = json!({ "rope_type": "linear", "factor": 8.0 });
    let both = json!({ "rope_parameters": newer, "rope_scaling": linear });
    assert_eq!(
        rope(both),
        (1e4, Some(RopeScaling::Linear(8.0))),
        "with the default theta, as in transformers"
    );
    assert_eq!(rope(json!({ "rope_parameters": newer, "rope_scaling": {} })), (7.0, None));
    assert_eq!(
        rope(json!({ "rope_parameters": newer, "rope_scaling": null, "rope_theta": 5.0 })),
        (7.0, None)
    );
    assert_eq!(rope(json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } })), (1e4, None));
    let error =
        parse("LlamaForCausalLM", json!({ "rope_scaling": { "rope_type": "longrope" } })).unwrap_err();
    assert!(format!("{error:#}").contains("\"longrope\" is not supported"), "{error:#}");
}

#[test]
fn yarn_takes_its_defaults_from_the_model() {
    let yarn = |keys: Value| match parse("Qwen2ForCausalLM", json!({ "rope_scaling": keys }))
        .unwrap()
        .rope_scaling
    {
        Some(RopeScaling::Yarn(yarn)) => yarn,
        other => panic!("{other:?}"),
    };
    let plain = yarn(json!({ "type": "yarn", "factor": 4.0 }));
    let expected = YarnRope {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_max_position_embeddings: 32_768,
        truncate: true,
        attention_factor: 0.1 * 4f64.ln() + 1.0,
    };
    assert_eq!(plain, expected);
    let scaled =
        json!({ "type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false });
    let scaled = yarn(scaled);
    assert_eq!(scaled.attention_factor, (0.1 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0));
    assert!(!scaled.truncate);
    let ratio = json!({ "type": "yarn", "factor": null, "original_max_position_embeddings": 8192 });
    assert_eq!(yarn(ratio).factor, 4.0);
}

#[test]
fn llama3s_original_positions_are_the_models_where_they_are_not_given() {
    let rope = json!({ "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    let original = |keys: Value| match parse("LlamaForCausalLM", keys).unwrap().rope_scaling {
        Some(RopeScaling::Llama3(rope)) => rope.original_max_position_embeddings,
        other => panic!("{other:?}"),
    };
    assert_eq!(original(json!({ "rope_scaling": rope })), 2048);
    assert_eq!(original(json!({ "rope_scaling": rope, "original_max_position_embeddings": 99 })), 99);
}

#[test]
fn the_model_type_stands_in_for_absent_architectures() {
    let architecture = |keys: Value| parse("MistralForCausalLM", keys).map(|config| config.architecture);
    for architectures in [Value::Null, json!([]), json!(["MistralModel"])] {
        let keys = json!({ "architectures": architectures, "model_type": "mistral" });
        assert_eq!(architecture(keys).unwrap(), Architecture::Mistral);
    }
    let error = |keys| architecture(keys).unwrap_err().to_string();
    assert!(error(json!({ "model_type": "llama" })).contains("says MistralForCausalLM"));
    assert!(error(json!({ "architectures": null })).contains("neither \"architectures\" nor \"model_type\""));
    assert!(
        error(json!({ "architectures": null, "model_type": "gpt2" })).contains("\"gpt2\" is not supported")
    );
}

#[test]
fn keys_of_other_architectures_are_not_read() {
    let swish = parse("LlamaForCausalLM", json!({ "hidden_act": "swish" }));
    assert!(swish.is_ok());
    assert!(!parse("MistralForCausalLM", json!({ "mlp_bias": true })).unwrap().mlp_bias);
    let biased = parse("LlamaForCausalLM", json!({ "mlp_bias": true })).unwrap();
    assert!(biased.mlp_bias && biased.refuse_biases("training").is_err());
    assert!(parse("LlamaForCausalLM", json!({})).unwrap().refuse_biases("training").is_ok());
    let windowless =
        json!({ "use_sliding_window": true, "max_window_layers": 0, "max_position_embeddings": 8 });
    assert_eq!(parse("Qwen2ForCausalLM", windowless).unwrap().sliding_window, [Some(4096); 4]);
}

#[test]
fn token_ids_come_alone_or_in_lists() {
    let config = parse("LlamaForCausalLM", json!({ "bos_token_id": 1, "eos_token_id": [2, 3] })).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![2, 3]));
    let config = parse("LlamaForCausalLM", json!({ "bos_token_id": null, "eos_token_id": 2 })).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));
    let config = parse("LlamaForCausalLM", json!({ "bos_token_id": -1, "eos_token_id": [-1, 2] })).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));
}

#[test]
fn token_ids_may_stand_in_generation_config() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 32, "eos_token_id": 5,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let generation = r#"{"bos_token_id": 1, "eos_token_id": [2, 5, 3], "top_p": NaN}"#;
    std::fs::write(dir.path().join("generation_config.json"), generation).unwrap();
    let config = ModelConfig::read(dir.path()).unwrap();
    assert_eq!((config.bos_token_id, config.eos_token_ids), (Some(1), vec![5, 2, 3]));
}

#[test]
fn an_adapter_is_called_one() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let error = read_json(dir.path()).unwrap_err().to_string();
    assert!(error.contains("PEFT adapter") && error.contains("merge_and_unload"), "{error}");
}
