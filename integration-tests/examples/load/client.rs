//! One client.

use std::{
    io::{BufRead, BufReader},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use reqwest::blocking;
use serde_json::{Value, json};

pub struct Client {
    http: blocking::Client,
    url: String,
}

/// A streamed answer.
pub struct Streamed {
    pub text: String,
    /// Between a chunk with text and the next.
    pub gaps: Vec<Duration>,
    pub usage: Value,
}

impl Client {
    pub fn new(url: &str) -> Result<Self> {
        let http = blocking::Client::builder().timeout(Duration::from_secs(300)).build()?;
        Ok(Self { http, url: url.trim_end_matches('/').to_owned() })
    }

    pub fn get(&self, route: &str) -> Result<String> {
        Ok(self.http.get(format!("{}{route}", self.url)).send()?.error_for_status()?.text()?)
    }

    /// Status and body.
    pub fn post(&self, route: &str, body: &Value) -> Result<(u16, Value)> {
        let answer = self.http.post(format!("{}{route}", self.url)).json(body).send()?;
        Ok((answer.status().as_u16(), answer.json()?))
    }

    /// Reads a streamed text completion, at most `most` chunks of it; then the connection is closed.
    pub fn stream(&self, body: &Value, most: usize) -> Result<Streamed> {
        let mut body = body.clone();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let answer = self.http.post(format!("{}/v1/completions", self.url)).json(&body).send()?;
        ensure!(answer.status() == 200, "status {}: {}", answer.status(), answer.text()?);
        let mut streamed = Streamed { text: String::new(), gaps: Vec::new(), usage: Value::Null };
        let mut last: Option<Instant> = None;
        let mut chunks = 0;
        for line in BufReader::new(answer).lines() {
            let line = line?;
            let Some(data) = line.strip_prefix("data: ") else { continue };
            if data == "[DONE]" {
                return Ok(streamed);
            }
            let event: Value = serde_json::from_str(data)?;
            if let Some(error) = event.get("error") {
                bail!("an error in the stream: {error}");
            }
            if event["usage"].is_object() {
                streamed.usage = event["usage"].clone();
            }
            if let Some(text) = event["choices"][0]["text"].as_str().filter(|text| !text.is_empty()) {
                streamed.text.push_str(text);
                let now = Instant::now();
                streamed.gaps.extend(last.replace(now).map(|last| now - last));
            }
            chunks += 1;
            if chunks == most {
                return Ok(streamed);
            }
        }
        bail!("the stream ended without [DONE] after {:?}", streamed.text)
    }

    /// Names of the model with a dial, from its list of models.
    pub fn aliases(&self) -> Result<Vec<String>> {
        let models: Value = serde_json::from_str(&self.get("/v1/models")?)?;
        let names = models["data"].as_array().context("no list of models")?;
        Ok(names
            .iter()
            .filter_map(|model| model["id"].as_str())
            .filter(|id| id.contains('@'))
            .map(str::to_owned)
            .collect())
    }
}
