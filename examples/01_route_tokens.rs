//! Routes tokens through one DynaMoE FFN at several sensitivities and prints the width that each token gets.
//!
//! ```text
//! cargo run --bin 01_route_tokens
//! ```
//!
//! Weights are random, so widths say nothing about difficulty here; they do say how the dial works: down a
//! column, a token never gets narrower.

use anyhow::Result;
use candle_core::{Device, Tensor};
use candle_nn::{Activation, Linear};
use dynamoe::{DynaMoeFfn, PrefixExperts, Projections, Router};

/// T, D, I and R: tokens, hidden_size, intermediate_size, the router's hidden size.
const SIZES: (usize, usize, usize, usize) = (12, 16, 64, 8);

fn main() -> Result<()> {
    let (t, d, i, r) = SIZES;
    let widths = dynamoe::config::even_widths(i, 4)?; // [16, 32, 48, 64]
    let random = |shape: &[usize], deviation| Tensor::randn(0f32, deviation, shape, &Device::Cpu);

    let dense = Projections {
        gate_proj: random(&[i, d], 0.2)?,
        up_proj: random(&[i, d], 0.2)?,
        down_proj: random(&[d, i], 0.2)?,
    };
    let experts = PrefixExperts::new(dense, Activation::Silu, &widths)?;
    let router = Router::Mlp {
        fc1: Linear::new(random(&[r, d], 0.5)?, Some(random(&[r], 0.1)?)),
        fc2: Linear::new(random(&[widths.len() - 1, r], 1.0)?, Some(random(&[widths.len() - 1], 0.5)?)),
    };
    let ffn = DynaMoeFfn::new(experts, router, None, 1.0)?;

    let x = random(&[t, d], 1.0)?; // (T, D)
    println!("sensitivity  mean width  width of each token");
    for sensitivity in [0.0, 0.25, 0.5, 0.75, 0.9, 1.0] {
        let routes = ffn.forward_routed(&x, &[sensitivity])?.1.wait()?;
        let each: Vec<String> = routes.0.iter().map(|&expert| format!("{:3}", widths[expert])).collect();
        println!("{sensitivity:11.2}  {:10.3}  {}", routes.mean_width(&widths), each.join(" "));
    }

    // Each token may have a dial of its own: here the first half runs dense, the second as narrow as can be.
    let dials: Vec<f64> = (0..t).map(|token| if token < t / 2 { 1.0 } else { 0.0 }).collect();
    let (y, routes) = ffn.forward_routed(&x, &dials)?;
    println!(
        "two dials in one call: mean width {:.3}, output {:?}",
        routes.wait()?.mean_width(&widths),
        y.dims()
    );
    Ok(())
}

#[test]
fn runs() -> Result<()> {
    main()
}
