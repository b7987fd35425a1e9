//! Log probabilities of a prompt's own tokens.

use std::{sync::Arc, time::Instant};

use candle_core::{DType, Tensor};
use mistralrs_core::{CustomLogitsProcessor, Response, row_data::RowData};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::{OwnedRwLockWriteGuard, mpsc::channel, oneshot};

use super::{Chosen, Job, Place, TokenLogprob, pick::Counts, request, send};
use crate::{
    RequestDial,
    serve::error::{ApiError, ApiResult, in_words},
};

/// What a model thinks of a prompt.
pub(in super::super) struct Scored {
    /// Of each token but the first, which nothing predicts.
    pub tokens: Vec<TokenLogprob>,
    /// The token that it would write next.
    pub next: Chosen,
    /// The dial that counted what was computed.
    pub dial: Option<Arc<RequestDial>>,
}

/// Data of a request to a dense model: nothing but a cache of its own.
struct Alone(u64);

impl RowData for Alone {
    fn cache_key(&self) -> Option<u64> {
        Some(self.0)
    }
}

/// Keeps others away from a prompt whose logits are asked for, and gives it keys and values of its own: where a part
/// of it came from a cache, its logits would be missing.
struct Carrier {
    row: Arc<dyn RowData>,
    _alone: OwnedRwLockWriteGuard<()>,
}

impl CustomLogitsProcessor for Carrier {
    fn apply(&self, logits: &Tensor, _context: &[u32]) -> candle_core::Result<Tensor> {
        Ok(logits.clone())
    }

    fn row_data(&self) -> Option<Arc<dyn RowData>> {
        Some(Arc::clone(&self.row))
    }
}

/// Computes how likely each token of a job's prompt is, with the `top` likeliest at each place.
///
/// # Errors
/// What the engine says instead.
pub(in super::super) async fn score(place: &Place, job: &Job, top: usize) -> ApiResult<Scored> {
    let alone = Arc::clone(&place.gate).write_owned().await;
    let (answers, mut received) = channel(1);
    let mut request = request(place, &job.prompt, answers);
    let dial = job.dial.as_ref().map(RequestDial::alone);
    let row: Arc<dyn RowData> = match &dial {
        Some(dial) => Arc::clone(dial) as _,
        None => Arc::new(Alone(request.id as u64)),
    };
    request.logits_processors = Some(vec![Arc::new(Carrier { row, _alone: alone })]);
    request.sampling_params.max_len = Some(1);
    request.return_raw_logits = true;
    send(place, request).await?;
    let (telling, told) = oneshot::channel();
    // outlives the client: the engine must find somebody who takes its answer
    tokio::spawn(async move {
        let _ = telling.send(received.recv().await);
        while received.recv().await.is_some() {}
    });
    let chunks = match told.await.ok().flatten() {
        Some(Response::Raw { logits_chunks, .. }) => logits_chunks,
        Some(Response::ValidationError(error)) => {
            return Err(ApiError::bad_request(in_words(error.as_ref())));
        }
        Some(Response::InternalError(error)) => return Err(ApiError::internal(in_words(error.as_ref()))),
        Some(_) => return Err(ApiError::internal("the engine did not answer with the logits of the prompt")),
        None => return Err(super::cut_short()),
    };
    let job = job.clone();
    let read = tokio::task::spawn_blocking(move || read(&chunks, &job, top));
    let (tokens, next) = read.await.map_err(ApiError::internal)?.map_err(ApiError::internal)?;
    Ok(Scored { tokens, next, dial })
}

fn read(chunks: &[Tensor], job: &Job, top: usize) -> anyhow::Result<(Vec<TokenLogprob>, Chosen)> {
    let mut tokens = Vec::with_capacity(job.prompt.len());
    let mut position = 0;
    let mut next = None;
    for chunk in chunks {
        let vocabulary = chunk.dim(candle_core::D::Minus1)?;
        let rows = chunk.elem_count() / vocabulary;
        let chunk = chunk.reshape((rows, vocabulary))?;
        for row in 0..rows {
            // one row at a time: all of them may be large
            let scores: Vec<f32> = chunk.get(row)?.to_dtype(DType::F32)?.to_vec1()?;
            anyhow::ensure!(!scores.iter().any(|score| score.is_nan()), "the model's scores are not numbers");
            position += 1;
            match job.prompt.get(position) {
                Some(&token) => tokens.push(TokenLogprob::of(&scores, token, top)),
                None => next = Some(choose(scores, job, top)),
            }
        }
    }
    anyhow::ensure!(
        position == job.prompt.len(),
        "logits of {position} tokens for a prompt of {}",
        job.prompt.len()
    );
    Ok((tokens, next.ok_or_else(|| anyhow::anyhow!("no logits of the last token"))?))
}

fn choose(scores: Vec<f32>, job: &Job, top: usize) -> Chosen {
    let mut counts = Counts::default();
    job.prompt.iter().for_each(|&token| *counts.prompt.entry(token).or_default() += 1);
    let mut adjusted = scores.clone();
    job.rules.adjust(&mut adjusted, &counts);
    let seed = job.rules.seed.unwrap_or_else(rand::random);
    let mut random = ChaCha8Rng::seed_from_u64(seed.wrapping_add(job.number));
    let token = job.rules.pick(&adjusted, &mut random);
    Chosen { token, logprob: Some(TokenLogprob::of(&scores, token, top)), neurons: None, at: Instant::now() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::run::tests::job;
    use candle_core::Device;

    #[test]
    fn each_row_scores_the_token_after_it() {
        let job = job(&[1, 0, 1]);
        let logits = Tensor::new(&[[0f32, 0.0], [0.0, 9.0], [9.0, 0.0]], &Device::Cpu).unwrap();
        for chunks in
            [vec![logits.clone()], vec![logits.narrow(0, 0, 1).unwrap(), logits.narrow(0, 1, 2).unwrap()]]
        {
            let (tokens, next) = read(&chunks, &job, 1).unwrap();
            assert_eq!(tokens.iter().map(|told| told.token).collect::<Vec<_>>(), [0, 1]);
            assert!((tokens[0].logprob - 0.5f32.ln()).abs() < 1e-6 && tokens[1].logprob > -1e-3);
            assert_eq!((next.token, tokens[1].top[0].0), (0, 1));
        }
        assert!(read(&[logits.narrow(0, 0, 2).unwrap()], &job, 1).is_err());
    }
}
