//! Models in the engine, without a server.

#![allow(dead_code)] // each test file uses some of it

use std::sync::Arc;

use dynamoe_mistralrs::{Dial, LoadedModel, loaded};
use mistralrs::{
    CustomLogitsProcessor, Model, ModelDType, NormalRequest, Request, RequestBuilder, Response,
    SamplingParams, TextMessageRole, TextModelBuilder, core::RequestMessage,
};
use tokio::sync::{Mutex, mpsc};

use crate::support::numbers;

pub const PROMPT: &str = "The quick brown fox jumps over the lazy dog.";

/// Models are loaded one at a time: [`loaded`] tells the newest one.
pub static LOADING: Mutex<()> = Mutex::const_new(());

pub struct Engine {
    pub model: Model,
    handle: Option<Arc<LoadedModel>>,
}

/// Loads a model on the CPU, in f32.
pub async fn build(builder: TextModelBuilder) -> Engine {
    try_build(builder).await.unwrap()
}

/// The same of a model that may be refused.
pub async fn try_build(builder: TextModelBuilder) -> anyhow::Result<Engine> {
    let _one = LOADING.lock().await;
    let before = loaded();
    let model = builder.with_force_cpu().with_dtype(ModelDType::F32).build().await?;
    let handle = loaded().into_iter().find(|model| !before.iter().any(|other| Arc::ptr_eq(other, model)));
    Ok(Engine { model, handle })
}

/// A model that computes every prompt anew.
pub fn plain(folder: &str) -> TextModelBuilder {
    TextModelBuilder::new(folder).with_prefix_cache_n(None)
}

impl Engine {
    pub fn handle(&self) -> &Arc<LoadedModel> {
        self.handle.as_ref().expect("a DynaMoE model")
    }

    /// Logits of every token of [`PROMPT`], the tokens, and the mean width used.
    pub async fn logits(&self, dial: Option<Dial>) -> (Vec<f32>, Vec<u32>, Option<f64>) {
        let request = RequestBuilder::new().add_message(TextMessageRole::User, PROMPT);
        let dial = dial.map(|dial| self.handle().request(dial).unwrap());
        let request = match &dial {
            Some(dial) => request.add_logits_processor(dial.processor()),
            None => request,
        };
        let (chunks, tokens) = self.model.send_raw_chat_request(request).await.unwrap();
        let width = dial.and_then(|dial| dial.mean_width(self.handle().full_size()));
        (chunks.iter().flat_map(numbers).collect(), tokens, width)
    }

    /// Logits of every one of `tokens`.
    pub async fn token_logits(&self, tokens: &[u32], dial: Option<Dial>) -> Vec<f32> {
        let processor = dial.map(|dial| self.handle().request(dial).unwrap().processor());
        self.token_logits_with(tokens, processor).await
    }

    /// Logits of every one of `tokens`, of a request with a logits processor.
    pub async fn token_logits_with(
        &self,
        tokens: &[u32],
        processor: Option<Arc<dyn CustomLogitsProcessor>>,
    ) -> Vec<f32> {
        let (sender, mut answers) = mpsc::channel(1);
        let messages = RequestMessage::CompletionTokens(tokens.to_vec());
        let sampling = SamplingParams { max_len: Some(1), ..SamplingParams::deterministic() };
        let mut request = NormalRequest::new_simple(messages, sampling, sender, 0, None, None);
        request.logits_processors = processor.map(|processor| vec![processor]);
        request.return_raw_logits = true;
        let engine = self.model.inner().get_sender(None).unwrap();
        engine.send(Request::Normal(Box::new(request))).await.unwrap();
        match answers.recv().await.unwrap() {
            Response::Raw { logits_chunks, .. } => logits_chunks.iter().flat_map(numbers).collect(),
            Response::InternalError(error) | Response::ValidationError(error) => panic!("{error}"),
            _ => panic!("the engine did not answer with logits"),
        }
    }

    /// A short greedy answer.
    pub async fn text(&self, prompt: &str, dial: Dial) -> String {
        let dial = self.handle().request(dial).unwrap();
        let request = RequestBuilder::new()
            .set_deterministic_sampler()
            .set_sampler_max_len(12)
            .add_logits_processor(dial.processor())
            .add_message(TextMessageRole::User, prompt);
        let answer = self.model.send_chat_request(request).await.unwrap();
        answer.choices[0].message.content.clone().unwrap_or_default()
    }
}
