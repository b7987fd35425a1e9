//! `finetune`: what is trained, and how.

use safetensors::Dtype;

use crate::lab::{Lab, finetune_args, log, run_args};

#[test]
fn every_method_trains() {
    let lab = Lab::new();
    lab.convert();
    let alone = ["--distill", "0", "--method"];
    for method in ["dense", "static", "random", "similarity", "priced"] {
        let out = format!("{method}-trained");
        lab.ok(&finetune_args(&out, &[&alone[..], &[method]].concat()));
        assert!(lab.loss(&out) < lab.loss("converted"), "{method}");
        let routers = lab.tensors(&out).keys().any(|name| name.contains(".mlp.router.fc1"));
        assert_eq!(routers, ["similarity", "priced"].contains(&method), "{method}");
    }
    // a converted model is its own teacher
    let distill = ["--distill", "0.6"];
    lab.ok(&finetune_args("own", &distill));
    lab.ok(&finetune_args("distilled", &[&distill[..], &["--teacher", "dense"]].concat()));
    let (own, distilled) = (lab.loss("own"), lab.loss("distilled"));
    assert!((own - distilled).abs() < 1e-3, "{own} {distilled}");
    assert!(lab.tensors("distilled") != lab.tensors("priced-trained"));
    lab.ok(&finetune_args("plain", &["--method", "dense", "--distill", "0.5"]));
    assert!(lab.tensors("plain") == lab.tensors("dense-trained"));
    lab.ok(&run_args("run", "640", &["--baselines", "none", "--distill", "0.5"]));
}

#[test]
fn accumulated_batches_make_the_same_step() {
    let lab = Lab::new();
    lab.convert();
    let args = ["finetune", "--model", "converted", "--data", "train.txt", "--tokens", "640"];
    let rest = ["--sequence-length", "32", "--method", "dense"];
    for (out, shape) in [
        ("one", ["--batch-size", "4", "--micro-batch", "4"]),
        ("two", ["--batch-size", "4", "--micro-batch", "2"]),
    ] {
        lab.ok(&[&args[..], &rest, &shape, &["--out", out]].concat());
    }
    let largest = lab.largest_difference("one", "two");
    // Adam divides small gradients by small numbers, so rounding shows; but far below the step, which is 2e-3 (--lr)
    assert!(largest < 1e-4, "{largest}");
    assert!(lab.tensors("one") != lab.tensors("converted"));
}

#[test]
fn routers_are_trained_alone() {
    let lab = Lab::with("Qwen3ForCausalLM", Dtype::BF16);
    lab.convert();
    let before = lab.tensors("converted");
    for method in ["similarity", "priced"] {
        lab.ok(&finetune_args(method, &["--train", "routers", "--method", method]));
        let after = lab.tensors(method);
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        let changed: Vec<&String> = before.keys().filter(|name| before[*name] != after[*name]).collect();
        assert!(changed.iter().any(|name| name.contains(".mlp.router.fc1")), "{changed:?}");
        assert!(changed.iter().all(|name| name.contains(".mlp.router.")), "{changed:?}");
    }
    let words = ["--train routers", "priced or similarity", "static"];
    lab.fails(&finetune_args("out", &["--train", "routers", "--method", "static"]), &words);
    assert!(!lab.path("out").exists());
}

#[test]
fn sequences_come_out_as_wide_as_they_are_meant_to_be() {
    let lab = Lab::new();
    lab.convert();
    for focus in ["0.4", "0.8"] {
        // all sequences are meant to be near the focus, whatever width is worth to this model
        let near =
            ["focus-power=20", "full-share=0", "narrowest-share=0"].map(|constant| ["--set", constant]);
        let draws = [&["--focus", focus][..], &near.concat()].concat();
        let args = ["finetune", "--model", "converted", "--data", "train.txt", "--out", focus];
        let size =
            ["--tokens", "32000", "--batch-size", "4", "--sequence-length", "16", "--set", "log-every=1"];
        lab.ok(&[&args[..], &size, &draws].concat());
        let log = log(&lab.path(focus).join("training/state/metrics.jsonl"));
        let half = &log[log.len() / 2..];
        let width = half.iter().map(|line| line.3).sum::<f64>() / half.len() as f64;
        assert!((width - focus.parse::<f64>().unwrap()).abs() < 0.1, "{focus}: {width}");
    }
}

#[test]
fn what_is_not_trained_stays_bit_for_bit() {
    let lab = Lab::new();
    lab.convert();
    let converted = lab.tensors("converted");
    let group = |name: &str| match name {
        _ if [".router.", ".own."].iter().any(|part| name.contains(part)) => "added",
        _ if name.ends_with(".order") => "order",
        _ if name.contains(".mlp.") => "dense FFN",
        _ => "backbone",
    };
    for (out, args, kept) in [
        ("added", ["--train", "added"], &["dense FFN", "backbone"][..]),
        ("attention", ["--set", "backbone-lr=0"], &["backbone"]),
        ("shared", ["--set", "shared-lr=0"], &["dense FFN"]),
    ] {
        let frozen = |name: &str| kept.contains(&group(name));
        lab.ok(&finetune_args(out, &args));
        let trained = lab.tensors(out);
        assert_eq!(trained.len(), converted.len(), "{out}");
        for (name, bytes) in &trained {
            let same = bytes == &converted[name];
            if group(name) == "order" {
                assert!(same, "{out}: {name} was changed");
                continue;
            }
            assert!(same || !frozen(name), "{out}: {name} was changed");
            // what is trained moves, but for biases that see no gradient
            assert!(!same || frozen(name) || name.ends_with("bias"), "{out}: {name} was not trained");
        }
    }
    let words = ["--train added", "--method dense"];
    lab.fails(&finetune_args("out", &["--train", "added", "--method", "dense"]), &words);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run() {
    let lab = Lab::new();
    lab.convert();
    let wild = ["--lr", "1e30", "--set", "clip=1e30", "--set", "warmup=0", "--save-every", "1"];
    let words = ["of step 2 is", "train.txt, tokens", "last good checkpoint: that of step 1", "smaller --lr"];
    lab.fails(&finetune_args("out", &wild), &words);
    assert!(!lab.path("out/config.json").exists());
    lab.fails(&["evaluate", "--model", "out", "--data", "valid.txt"], &["config.json"]);
    let rarely = ["--lr", "1e30", "--set", "clip=1e30", "--set", "warmup=0"];
    lab.fails(&finetune_args("rarely", &rarely), &["of step 2 is", "none was written yet"]);
}
