//! Connections: how many, and how long each may take.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Request, State},
    http::{StatusCode, header::CONTENT_LENGTH},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures::StreamExt;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    task::JoinSet,
};
use tokio_io_timeout::TimeoutWriter;
use tower::ServiceExt;

use super::{
    Options,
    error::{ApiError, ApiResult},
};

/// Bounds of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    connections: usize,
    header: Duration,
    write: Duration,
    drain: Duration,
}

impl Bounds {
    /// As the command line has them.
    pub fn of(options: &Options) -> Self {
        Self {
            connections: options.max_connections,
            header: Duration::from_secs(options.header_timeout),
            write: Duration::from_secs(options.write_timeout),
            drain: Duration::from_secs(options.drain_seconds),
        }
    }
}

/// Serves until `stop` is done, then lets requests in flight finish, for a while.
///
/// # Errors
/// The listener's.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    stop: impl Future<Output = ()> + Send,
    bounds: Bounds,
) -> Result<()> {
    let (stopping, stopped) = watch::channel(false);
    let seats = Arc::new(Semaphore::new(bounds.connections.min(Semaphore::MAX_PERMITS)));
    let mut running = JoinSet::new();
    let mut stop = std::pin::pin!(stop);
    loop {
        let (stream, peer) = tokio::select! {
            () = &mut stop => break,
            Some(_) = running.join_next(), if !running.is_empty() => continue,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // out of file descriptors, or a client that is gone already: neither is for ever
                    tracing::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        match Arc::clone(&seats).try_acquire_owned() {
            Ok(seat) => {
                let (router, stopped) = (router.clone(), stopped.clone());
                running.spawn(async move {
                    let _seat = seat;
                    connection(stream, peer, router, stopped, bounds).await;
                });
            }
            Err(_) => turn_away(stream),
        }
    }
    drop(listener);
    let drain = bounds.drain.as_secs();
    tracing::info!("stopping: requests in flight have {drain} s to finish");
    stopping.send(true).context("the server failed")?;
    let finish = async { while running.join_next().await.is_some() {} };
    if tokio::time::timeout(bounds.drain, finish).await.is_err() {
        tracing::warn!("requests were still in flight after {drain} s: closing their connections");
    }
    Ok(())
}

/// Says that there are too many connections, without waiting for anybody.
fn turn_away(stream: TcpStream) {
    let answer = "HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    let _ = stream.try_write(answer.as_bytes());
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    router: Router,
    mut stopped: watch::Receiver<bool>,
    bounds: Bounds,
) {
    // tokens are to leave as they come
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutWriter::new(stream);
    stream.set_timeout(Some(bounds.write));
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(ConnectInfo(peer));
        router.clone().oneshot(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.header)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    let mut connection = std::pin::pin!(connection);
    let stopping = async { drop(stopped.wait_for(|stopped| *stopped).await) };
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopping => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
}

/// Bounds of bodies.
#[derive(Clone)]
pub(super) struct Bodies {
    most: usize,
    time: Duration,
    /// KiB that all bodies together may still take.
    free: Arc<Semaphore>,
}

/// Largest bodies that may come at the same time.
const LARGEST_AT_ONCE: usize = 8;

impl Bodies {
    pub fn of(options: &Options) -> Self {
        let kib = (options.max_body_mib * 1024 * LARGEST_AT_ONCE).min(u32::MAX as usize);
        Self {
            most: options.max_body_mib * 1024 * 1024,
            time: Duration::from_secs(options.body_timeout),
            free: Arc::new(Semaphore::new(kib.min(Semaphore::MAX_PERMITS))),
        }
    }

    fn too_large(&self) -> ApiError {
        let mib = self.most >> 20;
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body may have {mib} MiB (--max-body-mib)"))
    }
}

/// Reads a body before its handler runs: all of it, in time, and no more than there may be.
pub(super) async fn read_body(State(bodies): State<Bodies>, request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    let length =
        parts.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > bodies.most) {
        return bodies.too_large().into_response();
    }
    let begun = Instant::now();
    let read = match tokio::time::timeout(bodies.time, read(&bodies, body)).await {
        Ok(read) => read,
        Err(_) => Err(ApiError::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not come in {} s", begun.elapsed().as_secs()),
        )),
    };
    match read {
        Ok((bytes, _room)) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Err(error) => error.into_response(),
    }
}

type Room = Option<tokio::sync::OwnedSemaphorePermit>;

async fn read(bodies: &Bodies, body: Body) -> ApiResult<(Bytes, Room)> {
    let mut chunks = body.into_data_stream();
    let mut all = Vec::new();
    let (mut room, mut kib): (Room, usize) = (None, 0);
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| ApiError::bad_request(format!("the body broke off: {error}")))?;
        if all.len() + chunk.len() > bodies.most {
            return Err(bodies.too_large());
        }
        all.extend_from_slice(&chunk);
        let more = all.len().div_ceil(1024) - kib;
        kib += more;
        let permit = Arc::clone(&bodies.free).try_acquire_many_owned(more as u32).map_err(|_| {
            ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too many large bodies at the same time; try again later",
            )
        })?;
        match &mut room {
            Some(room) => room.merge(permit),
            None => room = Some(permit),
        }
    }
    Ok((all.into(), room))
}
