//! How many answers may be computed or wait at the same time.

use std::sync::Arc;

use axum::http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, ApiResult};

/// Seats for answers: some run, the rest wait.
#[derive(Clone)]
pub(super) struct Seats {
    free: Arc<Semaphore>,
    /// Answers that run at the same time.
    running: usize,
    all: usize,
}

/// Seats of one request, for as long as it is on its way.
pub(super) struct Seat {
    _permit: OwnedSemaphorePermit,
}

impl Seats {
    /// For so many answers that run, and so many that wait.
    pub fn new(running: usize, waiting: usize) -> Self {
        let all = (running + waiting).min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(all)), running, all }
    }

    /// Takes seats for the answers of one request.
    ///
    /// # Errors
    /// 400: more than there are; 429: more than are free.
    pub fn take(&self, answers: usize) -> ApiResult<Seat> {
        if answers > self.all {
            return Err(ApiError::bad_request(format!(
                "prompt: expected at most {} answers to all prompts together, found {answers}",
                self.all
            )));
        }
        match Arc::clone(&self.free).try_acquire_many_owned(answers as u32) {
            Ok(permit) => Ok(Seat { _permit: permit }),
            Err(_) => Err(ApiError::new(
                StatusCode::TOO_MANY_REQUESTS,
                format!(
                    "{} answers run or wait already; try again later",
                    self.all - self.free.available_permits()
                ),
            )),
        }
    }

    /// Answers that run and that wait.
    pub fn in_use(&self) -> (usize, usize) {
        let taken = self.all - self.free.available_permits();
        (taken.min(self.running), taken.saturating_sub(self.running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_when_all_seats_are_taken_is_told_to_come_again() {
        let seats = Seats::new(2, 1);
        let first = seats.take(2).ok().unwrap();
        let _second = seats.take(1).ok().unwrap();
        assert_eq!(seats.in_use(), (2, 1));
        assert_eq!(seats.take(1).err().unwrap().status, StatusCode::TOO_MANY_REQUESTS);
        drop(first);
        assert_eq!(seats.in_use(), (1, 0));
        assert!(seats.take(2).is_ok());
        assert_eq!(seats.take(4).err().unwrap().status, StatusCode::BAD_REQUEST);
    }
}
