//! An OpenAI-compatible server with the dial in it: what the binary `dynamoe-serve` is made of.
//!
//! | route | |
//! | --- | --- |
//! | `POST /v1/chat/completions`, `/v1/completions` | OpenAI's, and a body may hold `sensitivity` or `budget` |
//! | `GET /` | a page to chat on |
//! | `GET`, `PUT /v1/dynamoe` | shows and sets the dial of requests that bring none |
//! | `GET /v1/models` | the model's names, with dials too |
//! | `GET /health` | whether the engine answers |
//! | `GET /metrics` | Prometheus text |
//!
//! Nothing else is served. A request goes through `request` (what may be asked for), `language` (text to tokens), `run`
//! (a sequence in the engine for each answer to each prompt) and `answer` (what the client is told).

mod access;
mod adaptive;
mod admission;
mod aliases;
mod answer;
mod completions;
mod connections;
mod default_dial;
mod error;
mod keys;
mod language;
mod load;
mod metrics;
mod models;
mod options;
mod page;
mod request;
mod run;
mod signals;
mod source;

use std::{
    io::Write,
    net::SocketAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use anyhow::{Context, Result, ensure};
use axum::{
    Router,
    extract::{DefaultBodyLimit, MatchedPath, Request, State},
    middleware::{Next, from_fn_with_state},
    response::Response,
    routing::{get, post},
};
use clap::{CommandFactory, FromArgMatches};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::Semaphore,
};
use tracing_subscriber::EnvFilter;

pub use adaptive::Range;
pub use language::Language;
pub use load::{Served, load};
pub use options::Options;

use crate::LoadedModel;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// What the handlers share.
#[derive(Clone)]
struct App {
    place: run::Place,
    model: Option<Arc<LoadedModel>>,
    adaptive: Option<adaptive::Adaptive>,
    names: aliases::Names,
    /// Whoever presents it may set the default dial from anywhere.
    token: Option<Arc<str>>,
    metrics: Arc<metrics::Metrics>,
    limits: request::Limits,
    seats: admission::Seats,
    /// Texts that may be made tokens at the same time.
    readers: Arc<Semaphore>,
}

/// The whole of `dynamoe-serve`, from the command line to the exit code. `version` is what `--version` says.
pub async fn main(version: &'static str) -> ExitCode {
    let matches = Options::command().version(version).get_matches();
    let options = Options::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match run_with(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // where nobody can be told there is nothing more to do
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Logs to stderr, loads, says on stdout where it listens, serves until SIGTERM or SIGINT.
///
/// # Errors
/// A port that is taken, a model that cannot be loaded, a listener that fails.
pub async fn run_with(options: Options) -> Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .log_internal_errors(false)
        .init();

    options.token()?;
    options.api_key()?;
    // bound first: a port that is taken is known before a large model is read
    let cannot = || format!("cannot listen at {}, port {}", options.host, options.port);
    let socket = bind((options.host, options.port).into()).with_context(cannot)?;
    let mut signals = signals::Signals::new()?;
    let served = tokio::select! {
        served = load(&options) => served?,
        // the loader's thread takes no word: the process ends without it
        () = signals.next() => std::process::exit(0),
    };
    // only now: until here connections are refused, so that a load balancer takes another server
    let listener = socket.listen(BACKLOG).with_context(cannot)?;
    let _ = writeln!(std::io::stdout(), "dynamoe-serve listens at http://{}", listener.local_addr()?);
    serve(listener, served, &options, signals.first_then_exit()).await
}

/// A socket at an address, which does not listen yet.
fn bind(address: SocketAddr) -> std::io::Result<TcpSocket> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    // connections of a server that has just ended do not keep the port
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// Serves until `stop` is done, then lets requests in flight finish, for the options' drain time at most.
///
/// # Errors
/// The listener's; the end of the engine, which ends the service too.
pub async fn serve(
    listener: TcpListener,
    served: Served,
    options: &Options,
    stop: impl Future<Output = ()> + Send,
) -> Result<()> {
    let engine = served.engine.get_sender(None)?;
    let ended = AtomicBool::new(false);
    let app = app(served, options)?;
    let follow = follow(app.clone());
    let router = routes(app, options)?;
    let stop = async {
        tokio::select! {
            () = stop => {}
            () = engine.closed() => ended.store(true, Relaxed),
        }
    };
    tokio::select! {
        served = connections::serve(listener, router, stop, connections::Bounds::of(options)) => served?,
        () = follow => {}
    }
    ensure!(!ended.load(Relaxed), "the engine has ended; the log says why");
    Ok(())
}

/// All routes over a loaded model.
///
/// # Errors
/// A token that is empty, an origin that is none, an engine that has ended.
pub fn router(served: Served, options: &Options) -> Result<Router> {
    routes(app(served, options)?, options)
}

fn routes(app: App, options: &Options) -> Result<Router> {
    let router = Router::new()
        .route("/", get(page::show))
        .route("/v1/chat/completions", post(completions::chat))
        .route("/v1/completions", post(completions::text))
        .route("/v1/dynamoe", get(default_dial::show).put(default_dial::set))
        .route("/v1/models", get(models::list))
        .route("/health", get(models::health))
        .route("/metrics", get(metrics::show))
        .fallback(access::not_found)
        .method_not_allowed_fallback(access::wrong_method)
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(connections::Bodies::of(options), connections::read_body))
        .layer(from_fn_with_state(keys::Keys::new(options.api_key()?, options.token()?), keys::guard))
        .layer(from_fn_with_state(access::Hosts::new(&options.allowed_hosts), access::guard))
        .layer(from_fn_with_state(Arc::clone(&app.metrics), count))
        .with_state(app);
    Ok(match options.cors_origins.as_slice() {
        [] => router,
        origins => router.layer(access::cors(origins)?),
    })
}

fn app(served: Served, options: &Options) -> Result<App> {
    let Served { engine, model, language, paged } = served;
    let id = engine.get_default_model_id().map_err(anyhow::Error::msg)?.context("the engine has no model")?;
    let limits = request::Limits {
        choices: options.max_choices,
        top_logprobs: options.max_top_logprobs,
        prompt_bytes: options.max_prompt_kib * 1024,
        answer_tokens: options.max_answer_tokens,
        logits_bytes: options.max_logits_mib << 20,
    };
    Ok(App {
        names: aliases::Names::new(&models::name(&id), model.as_deref()),
        place: run::Place {
            requests: engine.get_sender(None)?,
            engine,
            language,
            gate: Arc::default(),
            paged,
        },
        model,
        adaptive: options.adaptive(),
        token: options.token()?.map(Arc::from),
        metrics: Arc::default(),
        limits,
        seats: admission::Seats::new(options.max_seqs, options.max_waiting),
        readers: Arc::new(Semaphore::new(2)),
    })
}

/// Lets the default budget follow the load, if it is to; never ends.
async fn follow(app: App) {
    match (app.adaptive, &app.model) {
        (Some(adaptive), Some(model)) => adaptive.follow(model, &app.metrics).await,
        _ => std::future::pending().await,
    }
}

/// Counts every answer by its route and its status.
async fn count(State(metrics): State<Arc<metrics::Metrics>>, request: Request, next: Next) -> Response {
    let method = request.method().as_str().to_owned();
    // paths that are not served have one name: a client must not make up new ones
    let path =
        request.extensions().get::<MatchedPath>().map_or("other".into(), |path| path.as_str().to_owned());
    let response = next.run(request).await;
    metrics.answered(&method, &path, response.status().as_u16());
    response
}
