//! One request at a time.

use anyhow::Result;
use mistralrs::Model;

use crate::models::{Models, Spread, prompt};

const PROMPT_TOKENS: usize = 512;
/// What stands before the tokens whose generation is timed.
const DECODE_PROMPT_TOKENS: usize = 8;
const NEW_TOKENS: usize = 48;

struct Case<'a> {
    name: String,
    model: &'a Model,
    sensitivity: Option<f64>,
    prefill: Vec<f64>,
    decode: Vec<f64>,
    prefill_width: f64,
    decode_width: f64,
}

/// Prints prefill and decode of all cases.
pub async fn measure(models: &Models, rounds: usize) -> Result<()> {
    let case = |name: String, model, sensitivity| Case {
        name,
        model,
        sensitivity,
        prefill: Vec::new(),
        decode: Vec::new(),
        prefill_width: 1.0,
        decode_width: 1.0,
    };
    let mut cases = vec![
        case("dense".into(), &models.dense, None),
        case("sensitivity 1".into(), &models.routed, Some(1.0)),
    ];
    for target in [0.75, 0.5, 0.25] {
        let sensitivity = models.sensitivity_for(target).await?;
        cases.push(case(format!("width {target}"), &models.routed, Some(sensitivity)));
    }
    let (long, short) = (prompt(1, PROMPT_TOKENS), prompt(2, DECODE_PROMPT_TOKENS));
    for round in 0..=rounds {
        for case in &mut cases {
            let prefill = models.run(case.model, case.sensitivity, &long, 1).await?;
            let first = models.run(case.model, case.sensitivity, &short, 1).await?;
            let decode = models.run(case.model, case.sensitivity, &short, 1 + NEW_TOKENS).await?;
            (case.prefill_width, case.decode_width) = (prefill.width, decode.width);
            // the first round warms up
            if round > 0 {
                case.prefill.push(prefill.seconds / PROMPT_TOKENS as f64);
                case.decode.push((decode.seconds - first.seconds) / NEW_TOKENS as f64);
            }
        }
    }
    report(models, &cases);
    Ok(())
}

fn report(models: &Models, cases: &[Case]) {
    let (others, ffn) = models.weights();
    let ideal = |others: f64, width: f64| (others + ffn) / (others + ffn * width);
    println!("prefill of {PROMPT_TOKENS} tokens\n");
    println!("| | mean width | tokens/s | × dense | ideal | of ideal |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for case in cases {
        // the output matrix is multiplied with one token only
        let ideal = ideal(others - models.output_weights(), case.prefill_width);
        row(case, &case.prefill, &cases[0].prefill, (case.prefill_width, ideal), "");
    }
    println!("\ndecode of {NEW_TOKENS} tokens\n");
    println!("| | mean width | tokens/s | × dense | ideal | of ideal | GB/s |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for case in cases {
        let ideal = ideal(others, case.decode_width);
        let bytes = (others + ffn * case.decode_width) * models.bytes_per_weight;
        let rate = bytes / Spread::of(case.decode.iter().copied()).median / 1e9;
        row(case, &case.decode, &cases[0].decode, (case.decode_width, ideal), &format!(" {rate:.1} |"));
    }
}

fn row(case: &Case, times: &[f64], dense: &[f64], (width, ideal): (f64, f64), more: &str) {
    let rate = Spread::of(times.iter().map(|time| 1.0 / time));
    let ratio = Spread::of(dense.iter().zip(times).map(|(dense, time)| dense / time));
    println!(
        "| {} | {width:.3} | {} | {} | {ideal:.3} | {:.0} % |{more}",
        case.name,
        rate.show(1),
        ratio.show(3),
        100.0 * ratio.median / ideal
    );
}
