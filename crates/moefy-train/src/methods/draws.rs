//! Which widths training sees: how sequences draw their dials.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::Routing;

/// A dial from 0 to 1: a share of the sequences at each end, the others uniform.
pub(super) fn uniform(rng: &mut ChaCha8Rng, routing: &Routing) -> f64 {
    let (u, v): (f64, f64) = (rng.random(), rng.random());
    if u < routing.narrowest_share {
        0.0
    } else if u > 1.0 - routing.full_share {
        1.0
    } else {
        v
    }
}

/// A share of the way from the narrowest width to the full one: [`uniform`], then pulled towards the focus.
pub(super) fn near_focus(rng: &mut ChaCha8Rng, routing: &Routing) -> f64 {
    let narrowest = routing.width_shares[0].min(1.0 - 1e-9);
    let focus = ((routing.focus - narrowest) / (1.0 - narrowest)).clamp(0.0, 1.0);
    pull_towards(focus, uniform(rng, routing), routing.focus_power)
}

/// Raises the distance of `dial` from `focus`, as a share of the distance of its end, to the power of `power`; 0 and 1
/// stay.
fn pull_towards(focus: f64, dial: f64, power: f64) -> f64 {
    let end = if dial < focus { -focus } else { 1.0 - focus };
    if end == 0.0 { dial } else { focus + end * ((dial - focus) / end).powf(power) }
}

#[cfg(test)]
mod tests {
    use super::super::tests::routing;
    use super::*;
    use crate::random::in_step;

    #[test]
    fn dials_are_pulled_towards_the_focus_and_reach_both_ends() {
        for focus in [0.0, 0.2, 0.5, 1.0] {
            let at = |dial| pull_towards(focus, dial, 2.0);
            assert_eq!([at(0.0), at(focus), at(1.0)], [0.0, focus, 1.0]);
            let steps: Vec<f64> = (0..=100).map(|k| at(f64::from(k) / 100.0)).collect();
            assert!(steps.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12));
            assert!((pull_towards(focus, 0.3, 1.0) - 0.3).abs() < 1e-12);
        }
        // widths of .25 to 1 and a focus of .5: a third of the way
        let routing = Routing { full_share: 0.2, narrowest_share: 0.1, focus: 0.5, ..routing(&[0.25, 1.0]) };
        let mut rng = in_step(7, 0, 0);
        let dials: Vec<f64> = (0..20_000).map(|_| near_focus(&mut rng, &routing)).collect();
        let share = |from: f64, to: f64| {
            dials.iter().filter(|dial| (from..=to).contains(*dial)).count() as f64 / dials.len() as f64
        };
        let sides = [share(1e-9, 1.0 / 3.0), share(1.0 / 3.0, 1.0 - 1e-9)];
        for (found, expected) in [share(0.0, 0.0), share(1.0, 1.0), sides[0], sides[1]].into_iter().zip([
            0.1,
            0.2,
            0.7 / 3.0,
            1.4 / 3.0,
        ]) {
            assert!((found - expected).abs() < 0.015, "{found} for {expected}");
        }
        // a quarter of the way from the focus to an end holds half of its side
        assert!((share(0.25, 0.5) - 0.35).abs() < 0.015);
    }
}
