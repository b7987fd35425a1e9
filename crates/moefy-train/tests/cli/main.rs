//! The program as a user runs it: its commands on tiny models, interruptions, and input that is wrong.

mod add_on;
mod card;
mod compare;
mod evaluate;
mod finetune;
mod gguf;
#[path = "../../../dynamoe-model/tests/support/gguf.rs"]
mod gguf_files;
mod hub;
mod lab;
mod mask;
mod memory;
mod output;
mod own_text;
mod precision;
mod resume;
mod run;
mod slice;
mod sparsity;
#[path = "../support/mod.rs"]
mod support;
mod tensorboard;
mod text;
mod tools;
mod wrong_input;
