//! Which token comes next.

use std::collections::HashMap;

use rand::Rng;

use super::logprobs::likeliest;
use crate::serve::request::Rules;

/// How often tokens were written.
#[derive(Debug, Default)]
pub(super) struct Counts {
    /// In the answer so far.
    pub answer: HashMap<u32, u32>,
    /// In the prompt; 0 where they are not.
    pub prompt: HashMap<u32, u32>,
}

impl Rules {
    /// Whether scores depend on what was written before.
    pub(super) fn has_penalties(&self) -> bool {
        self.frequency_penalty != 0.0 || self.presence_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// The scores that tokens are chosen by: the model's, changed by biases and penalties.
    pub(super) fn adjust(&self, scores: &mut [f32], counts: &Counts) {
        if self.repetition_penalty != 1.0 {
            let fresh = counts.answer.keys().filter(|token| !counts.prompt.contains_key(token));
            for &token in counts.prompt.keys().chain(fresh) {
                if let Some(score) = scores.get_mut(token as usize) {
                    let penalty = self.repetition_penalty;
                    *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
                }
            }
        }
        for (&token, &count) in &counts.answer {
            if let Some(score) = scores.get_mut(token as usize) {
                *score -= self.frequency_penalty * count as f32 + self.presence_penalty;
            }
        }
        for &(token, bias) in &self.bias {
            if let Some(score) = scores.get_mut(token as usize) {
                *score += bias;
            }
        }
    }

    /// Chooses a token by its score.
    pub(super) fn pick(&self, scores: &[f32], random: &mut impl Rng) -> u32 {
        if self.temperature < 1e-6 {
            let larger = |best: (u32, f32), next: (u32, f32)| if next.1 > best.1 { next } else { best };
            return (0..).zip(scores.iter().copied()).fold((0, f32::NEG_INFINITY), larger).0;
        }
        let mut candidates = self.candidates(scores);
        let mut total = 0.0;
        for (_, weight) in &mut candidates {
            total += *weight;
            *weight = total;
        }
        let point = random.random::<f64>() * total;
        let chosen = candidates.iter().find(|(_, sum)| point < *sum).or(candidates.last());
        chosen.map_or(0, |&(token, _)| token)
    }

    /// The tokens that top_k, top_p and min_p leave, with weights in proportion to their probabilities.
    fn candidates(&self, scores: &[f32]) -> Vec<(u32, f64)> {
        let sorted = self.top_k.is_some() || self.top_p < 1.0;
        let scores: Vec<(u32, f32)> = if sorted {
            likeliest(scores, self.top_k.unwrap_or(usize::MAX))
        } else {
            (0..).zip(scores.iter().copied()).collect()
        };
        let largest = scores.iter().fold(f32::NEG_INFINITY, |largest, &(_, score)| largest.max(score));
        let weigh = |(token, score)| (token, (f64::from(score - largest) / self.temperature).exp());
        let mut candidates: Vec<(u32, f64)> = scores.into_iter().map(weigh).collect();
        if self.top_p < 1.0 {
            let enough = self.top_p * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sum = 0.0;
            let few = candidates.iter().take_while(|(_, weight)| {
                let needed = sum < enough;
                sum += weight;
                needed
            });
            let few = few.count().max(1);
            candidates.truncate(few);
        }
        // the likeliest has weight 1
        candidates.retain(|&(_, weight)| weight > 0.0 && weight >= self.min_p);
        candidates
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::run::tests::greedy;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    fn rules() -> Rules {
        Rules { temperature: 1.0, logprobs: None, ..greedy() }
    }

    /// Probabilities 0.1, 0.6, 0.3, 0.
    fn scores() -> [f32; 4] {
        [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln(), f32::NEG_INFINITY]
    }

    fn frequencies(rules: &Rules) -> [f64; 4] {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut counts = [0.0; 4];
        (0..10_000).for_each(|_| counts[rules.pick(&scores(), &mut random) as usize] += 1e-4);
        counts
    }

    fn close(found: [f64; 4], expected: [f64; 4]) {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.02), "{found:?}, {expected:?}");
    }

    #[test]
    fn tokens_come_as_often_as_they_are_likely() {
        close(frequencies(&rules()), [0.1, 0.6, 0.3, 0.0]);
        // squares of the probabilities
        close(frequencies(&Rules { temperature: 0.5, ..rules() }), [0.022, 0.783, 0.196, 0.0]);
        close(frequencies(&Rules { temperature: 0.0, ..rules() }), [0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn unlikely_tokens_can_be_left_out() {
        let two_thirds = [0.0, 0.667, 0.333, 0.0];
        close(frequencies(&Rules { top_k: Some(2), ..rules() }), two_thirds);
        close(frequencies(&Rules { top_p: 0.8, ..rules() }), two_thirds);
        close(frequencies(&Rules { min_p: 0.3, ..rules() }), two_thirds);
        for one in [
            Rules { top_k: Some(1), ..rules() },
            Rules { top_p: 0.0, ..rules() },
            Rules { top_p: 0.6, ..rules() },
            Rules { min_p: 1.0, ..rules() },
        ] {
            close(frequencies(&one), [0.0, 1.0, 0.0, 0.0]);
        }
    }

    #[test]
    fn a_seed_fixes_the_choice() {
        let draw = |seed| {
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            (0..20).map(|_| rules().pick(&scores(), &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }

    #[test]
    fn biases_and_penalties_change_scores() {
        let counts =
            Counts { answer: HashMap::from([(0, 2), (1, 1)]), prompt: HashMap::from([(1, 5), (2, 1)]) };
        let adjusted = |rules: Rules| {
            let mut scores = [1.0, -1.0, 2.0, 3.0];
            rules.adjust(&mut scores, &counts);
            scores
        };
        assert_eq!(adjusted(Rules { frequency_penalty: 0.5, ..rules() }), [0.0, -1.5, 2.0, 3.0]);
        assert_eq!(adjusted(Rules { presence_penalty: 0.5, ..rules() }), [0.5, -1.5, 2.0, 3.0]);
        assert_eq!(adjusted(Rules { repetition_penalty: 2.0, ..rules() }), [0.5, -2.0, 1.0, 3.0]);
        assert_eq!(adjusted(Rules { bias: vec![(3, -100.0), (9, 1.0)], ..rules() }), [1.0, -1.0, 2.0, -97.0]);
    }
}
