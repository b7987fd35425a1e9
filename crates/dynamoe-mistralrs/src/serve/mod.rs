//! mistral.rs's OpenAI-compatible server with the dial in it: what the binary `dynamoe-serve` is made of.
//!
//! | route | |
//! | --- | --- |
//! | `POST /v1/chat/completions`, `/v1/completions` | mistral.rs's, and a body may hold `sensitivity` or `budget` |
//! | `GET`, `PUT /v1/dynamoe` | shows and sets the dial of requests that bring none |
//! | `GET /v1/models` | the models, by their names |
//! | `GET /health` | whether the engine answers |
//! | `GET /metrics` | Prometheus text |
//!
//! Nothing else is served: mistral.rs's other routes read files and addresses of a client's choice, and unload, requantize
//! or reload the model for everybody.

mod access;
mod completions;
mod default_dial;
mod error;
mod limits;
mod metrics;
mod models;
mod options;

use std::{
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware::from_fn_with_state,
    routing::{get, post},
};
use clap::Parser;
use mistralrs_core::Request;
use mistralrs_server_core::{
    mistralrs_for_server_builder::MistralRsForServerBuilder, types::SharedMistralRsState,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tracing_subscriber::EnvFilter;

pub use options::Options;

use crate::{LoadedModel, loaded};

/// A model that is loaded and can be served.
#[derive(Clone)]
pub struct Served {
    /// The engine that runs it.
    pub engine: SharedMistralRsState,
    /// Its dial and its counters; none if it is dense.
    pub model: Option<Arc<LoadedModel>>,
}

/// What the handlers share.
#[derive(Clone)]
struct App {
    engine: SharedMistralRsState,
    /// The engine that was loaded. The state would start another one over what a dead one has left.
    to_engine: mpsc::Sender<Request>,
    model: Option<Arc<LoadedModel>>,
    /// Whoever presents it may set the default dial from anywhere.
    token: Option<Arc<str>>,
    requests: Arc<metrics::Requests>,
    limits: limits::Limits,
}

/// The whole of `dynamoe-serve`, from the command line to the exit code.
pub async fn main() -> ExitCode {
    match run(Options::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to stderr, loads, says on stdout where it listens, serves until SIGTERM or SIGINT.
///
/// # Errors
/// A port that is taken, a model that cannot be loaded, a listener that fails.
pub async fn run(options: Options) -> Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();

    options.token()?;
    // bound first: a port that is taken is known before a large model is read
    let listener = TcpListener::bind((options.host, options.port))
        .await
        .with_context(|| format!("cannot listen at {}, port {}", options.host, options.port))?;
    let stop = stop_signal()?;
    let served = load(&options).await?;
    println!("dynamoe-serve listens at http://{}", listener.local_addr()?);
    serve(listener, served, &options, stop).await
}

/// Loads the model that `options` names.
///
/// # Errors
/// Whatever keeps mistral.rs from loading it; a dial that the model does not have.
pub async fn load(options: &Options) -> Result<Served> {
    let before = loaded();
    let engine = MistralRsForServerBuilder::new()
        .with_model(options.model_selected()?)
        .with_max_seqs(options.max_seqs)
        .with_in_situ_quant_optional(options.isq.clone())
        .with_chat_template_optional(options.chat_template.clone())
        .with_prefix_cache_n(options.prefix_cache)
        .with_cpu(options.cpu)
        .set_paged_attn(options.paged_attn)
        .build()
        .await
        .with_context(|| format!("cannot load {}", options.source()))?;
    let model = loaded().into_iter().find(|model| !before.iter().any(|other| Arc::ptr_eq(model, other)));
    match (&model, options.dial()) {
        (Some(model), Some(dial)) => model.set_dial(dial)?,
        (None, Some(_)) => {
            bail!(
                "--sensitivity and --budget set the dial of a DynaMoE model, but the model that was loaded is dense"
            )
        }
        (_, None) => {}
    }
    if let Some(model) = &model {
        // the engine's dummy run is no request
        model.counters().reset();
    }
    Ok(Served { engine, model })
}

/// All routes over a loaded model.
///
/// # Errors
/// A token that is empty; an engine that has ended.
pub fn router(served: Served, options: &Options) -> Result<Router> {
    let Served { engine, model } = served;
    let to_engine = engine.get_sender(None)?;
    let limits = limits::Limits {
        choices: options.max_choices,
        top_logprobs: options.max_top_logprobs,
        prompt_bytes: options.max_prompt_kib * 1024,
    };
    let token = options.token()?.map(Arc::from);
    let app = App { engine, to_engine, model, token, requests: Arc::default(), limits };
    Ok(Router::new()
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::text))
        .route("/v1/dynamoe", get(default_dial::show).put(default_dial::set))
        .route("/v1/models", get(models::list))
        .route("/health", get(models::health))
        .route("/metrics", get(metrics::show))
        .fallback(access::not_found)
        .method_not_allowed_fallback(access::wrong_method)
        .layer(DefaultBodyLimit::max(options.max_body_mib * 1024 * 1024))
        .layer(from_fn_with_state(access::Hosts::new(&options.allowed_hosts), access::guard))
        .with_state(app))
}

/// Serves until `stop` is done, then lets requests in flight finish, for the options' drain time at most.
///
/// # Errors
/// The listener's; the end of the engine, which also ends the service.
pub async fn serve(
    listener: TcpListener,
    served: Served,
    options: &Options,
    stop: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let to_engine = served.engine.get_sender(None)?;
    let engine_ended = Arc::new(AtomicBool::new(false));
    let stop = {
        let engine_ended = Arc::clone(&engine_ended);
        async move {
            tokio::select! {
                () = stop => {}
                () = to_engine.closed() => engine_ended.store(true, Relaxed),
            }
        }
    };
    serve_until(listener, router(served, options)?, stop, Duration::from_secs(options.drain_seconds)).await?;
    ensure!(!engine_ended.load(Relaxed), "the engine has ended; the log says why");
    Ok(())
}

async fn serve_until(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()> + Send + 'static,
    drain: Duration,
) -> Result<()> {
    let (stopping, stopped) = oneshot::channel();
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let server = axum::serve(listener, service).with_graceful_shutdown(async move {
        stop.await;
        tracing::info!("stopping: requests in flight have {} s to finish", drain.as_secs());
        let _ = stopping.send(());
    });
    let timeout = async move {
        match stopped.await {
            Ok(()) => tokio::time::sleep(drain).await,
            // the server ended by itself
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        result = server => result.context("the server failed"),
        () = timeout => {
            tracing::warn!("requests were still in flight after {} s: closing their connections", drain.as_secs());
            Ok(())
        }
    }
}

/// Done on SIGTERM or SIGINT.
///
/// # Errors
/// The system's, if it does not take the handlers.
pub fn stop_signal() -> Result<impl Future<Output = ()> + Send + 'static> {
    #[cfg(unix)]
    let mut terminate = {
        use tokio::signal::unix::{SignalKind, signal};
        signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?
    };
    Ok(async move {
        #[cfg(unix)]
        let terminated = async {
            terminate.recv().await;
        };
        #[cfg(not(unix))]
        let terminated = std::future::pending::<()>();
        tokio::select! {
            () = terminated => {}
            _ = tokio::signal::ctrl_c() => {}
        }
    })
}
