use std::cell::Cell;

use super::*;

/// Tokens of a layer.
const TOKENS: usize = 4000;

fn logit(share: f64) -> f64 {
    (share / (1.0 - share)).ln()
}

/// Layers of a quarter width or full, whose logits are spread evenly as shares and moved by `shift`.
fn spread(sensitivity: &[f64], shift: f64) -> Result<Scores> {
    let share = |n: usize| (n as f64 + 0.5) / TOKENS as f64;
    let logits: Vec<f32> = (0..TOKENS).map(|n| (logit(share(n).cbrt()) + shift) as f32).collect();
    let beyond = |s: &f64| logits.partition_point(|&l| f64::from(l) < logit(*s)) as f64 / TOKENS as f64;
    let width = sensitivity.iter().map(|s| 0.25 + 0.75 * beyond(s)).sum::<f64>() / sensitivity.len() as f64;
    Ok(Scores::new(width, vec![0.25, 1.0], vec![vec![logits]; sensitivity.len()]))
}

/// Scores that do not depend on what earlier layers did.
fn smooth(sensitivity: &[f64]) -> Result<Scores> {
    spread(sensitivity, 0.0)
}

/// Scores that depend on it: the wider the earlier layers, the higher they are.
fn moving(sensitivity: &[f64]) -> Result<Scores> {
    spread(sensitivity, 0.6 * sensitivity[0].powi(2))
}

/// Each layer is either as narrow as can be or full.
fn jump(sensitivity: &[f64]) -> Result<Scores> {
    let width = |s: &f64| if *s <= 0.7 { 0.25 } else { 1.0 };
    let mean = sensitivity.iter().map(width).sum::<f64>() / sensitivity.len() as f64;
    Ok(Scores::new(mean, vec![0.25, 1.0], vec![vec![vec![logit(0.7) as f32]]; sensitivity.len()]))
}

fn uniform(sensitivity: &Sensitivity) -> f64 {
    match sensitivity {
        Sensitivity::Uniform(s) => *s,
        other => panic!("expected one sensitivity, found {other:?}"),
    }
}

#[test]
fn widths_are_found_with_few_passes() {
    for (model, most) in [(smooth as fn(&[f64]) -> _, 2), (moving, 16)] {
        let count = Cell::new(0);
        let measure = |list: &[f64]| {
            count.set(count.get() + 1);
            model(list)
        };
        let mut solver = Solver::new(3, measure).unwrap();
        solver.dial_scale().unwrap().unwrap();
        for width in TABLE {
            let (found, reached) = solver.solve(width).unwrap();
            assert!((reached - width).abs() <= TOLERANCE, "{width}: {reached}");
            let measured = model(&[uniform(&found); 3]).unwrap().width;
            assert!((measured - width).abs() <= TOLERANCE, "{width}: {measured}");
        }
        assert!(count.get() <= most, "{} passes", count.get());
        let before = count.get();
        solver.solve(0.5).unwrap();
        assert_eq!(count.get(), before, "what is known is not measured again");
    }
}

#[test]
fn both_ends_of_the_dial_are_found() {
    let mut solver = Solver::new(3, smooth).unwrap();
    for (width, end, reached) in [(0.0, 0.0, 0.25), (0.1, 0.0, 0.25), (0.25, 0.0, 0.25), (1.0, 1.0, 1.0)] {
        assert_eq!(solver.solve(width).unwrap(), (Sensitivity::Uniform(end), reached), "{width}");
    }
    for wrong in [-0.1, 1.1, f64::NAN] {
        assert!(solver.solve(wrong).unwrap_err().to_string().contains("budget"), "{wrong}");
        let table = solver.table(&[wrong], &Drift::default(), &Progress::hidden());
        assert!(table.unwrap_err().to_string().contains("budget"), "{wrong}");
    }
}

#[test]
fn layers_are_divided_where_the_width_jumps() {
    let mut solver = Solver::new(4, jump).unwrap();
    for (width, full_layers) in [(0.45, 1), (0.6, 2), (0.8, 3)] {
        let (found, reached) = solver.solve(width).unwrap();
        let Sensitivity::PerLayer(list) = &found else { panic!("{width}: {found:?}") };
        let full: Vec<bool> = list.iter().map(|&s| s > 0.7).collect();
        assert!(full.is_sorted_by(|a, b| a >= b), "the first layers are the full ones: {list:?}");
        assert_eq!(full.iter().filter(|full| **full).count(), full_layers, "{width}: {list:?}");
        assert_eq!(reached, jump(list).unwrap().width);
    }
    // close to an end of the jump, one sensitivity for all layers serves
    assert_eq!(solver.solve(0.26).unwrap().1, 0.25);
    uniform(&solver.solve(0.99).unwrap().0);
}

#[test]
fn a_dip_of_the_width_does_not_keep_the_search_going() {
    let dips = |list: &[f64]| {
        let width = match list[0] {
            0.0 => 0.25,
            1.0 => 1.0,
            s => 0.1 + 0.1 * s,
        };
        Ok(Scores::new(width, vec![width], vec![Vec::new()]))
    };
    let mut solver = Solver::new(1, dips).unwrap();
    let (_, reached) = solver.solve(0.5).unwrap();
    assert!(reached == 0.25 || reached == 1.0, "{reached}");
}

#[test]
fn a_rescaled_dial_covers_the_widths() {
    let mut solver = Solver::new(2, moving).unwrap();
    let scale = solver.dial_scale().unwrap().unwrap();
    for share in [0.2f64, 0.8] {
        // a router whose logit was mapped to that of `share` had this logit before
        let before = sensitivity((logit(share) - scale.shift) / scale.scale);
        let width = moving(&[before; 2]).unwrap().width;
        assert!((width - (0.25 + 0.75 * share)).abs() <= TOLERANCE, "{share}: {width}");
        assert!((scale.map(before) - share).abs() < 1e-9);
    }
    assert_eq!([scale.map(0.0), scale.map(1.0)], [0.0, 1.0]);
    assert_eq!(Solver::new(2, jump).unwrap().dial_scale().unwrap(), None);
}

#[test]
fn a_table_has_a_row_for_each_width_that_was_reached() {
    let table = |measure: fn(&[f64]) -> Result<Scores>, widths: &[f64]| -> Vec<f64> {
        let mut solver = Solver::new(2, measure).unwrap();
        let rows = solver.table(widths, &Drift::default(), &Progress::hidden()).unwrap();
        rows.iter().map(|row| row.width).collect()
    };
    assert_eq!(table(smooth, &[0.75, 0.3, 0.5]), [0.3, 0.5, 0.75]);
    // two layers that jump reach .25, .625 and 1 only
    assert_eq!(table(jump, &[0.3, 0.4, 0.6, 0.65, 0.9]), [0.25, 0.625, 1.0]);
}

#[test]
fn a_sample_that_is_unlike_all_tokens_is_made_up_for() {
    let mut sample = Solver::new(2, smooth).unwrap();
    let hidden = Progress::hidden();
    let all = |s: f64| -> Result<f64> { Ok(spread(&[s; 2], 0.15)?.width) };
    let first = sample.table(&TABLE, &Drift::default(), &hidden).unwrap();
    let drift = Drift::measure(&first, 0.25, all).unwrap();
    let second = sample.table(&TABLE, &drift, &hidden).unwrap();
    let error = |rows: &[Budget]| {
        let of_row = |row: &Budget| (all(uniform(&row.sensitivity)).unwrap() - row.width).abs();
        rows.iter().map(of_row).fold(0.0, f64::max)
    };
    assert_eq!(second.len(), TABLE.len());
    assert!(error(&first) > 0.02 && error(&second) < 0.006, "{} {}", error(&first), error(&second));
}
