//! demo

pub mod corpus;
