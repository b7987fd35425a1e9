//! Swaps the MLP of a transformer block for a DynaMoE FFN: the same output at sensitivity 1, bit for bit, and a
//! cheaper one below.
//!
//! ```text
//! cargo run --bin 02_swap_ffn
//! ```
//!
//! The block asks of its MLP only that it is a candle [`Module`]. Models that keep a concrete, private MLP type,
//! such as those of candle-transformers, need that one field made replaceable first.

use std::sync::Arc;

use anyhow::{Result, ensure};
use candle_core::{D, Device, Tensor};
use candle_nn::{Activation, Linear, Module, RmsNorm, ops::softmax};
use dynamoe::{DynaMoeFfn, PrefixExperts, Projections, Router};

/// T, D, I: tokens, hidden_size, intermediate_size.
const SIZES: (usize, usize, usize) = (10, 32, 128);

/// The dense SwiGLU MLP.
struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Module for Mlp {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.down_proj.forward(&(self.gate_proj.forward(x)?.silu()? * self.up_proj.forward(x)?)?)
    }
}

/// A pre-norm block with one attention head.
struct Block {
    norms: [RmsNorm; 2],
    qkv: [Linear; 3],
    o_proj: Linear,
    mlp: Box<dyn Module>,
}

impl Module for Block {
    /// `x (1, T, D)` → `(1, T, D)`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (_, t, d) = x.dims3()?;
        let normed = self.norms[0].forward(x)?;
        let [q, k, v] = [0, 1, 2].map(|i| self.qkv[i].forward(&normed));
        let scores = (q?.matmul(&k?.t()?)? / (d as f64).sqrt())?; // (1, T, T)
        let mask: Vec<f32> =
            (0..t * t).map(|at| if at % t > at / t { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (1, t, t), x.device())?;
        let mixed = softmax(&(scores + mask)?, D::Minus1)?.matmul(&v?)?;
        let x = (x + self.o_proj.forward(&mixed)?)?;
        &x + self.mlp.forward(&self.norms[1].forward(&x)?)?
    }
}

fn main() -> Result<()> {
    let (t, d, i) = SIZES;
    let random = |shape: &[usize]| Tensor::randn(0f32, 0.2, shape, &Device::Cpu);
    let linear = |rows, columns| Ok::<_, candle_core::Error>(Linear::new(random(&[rows, columns])?, None));
    let norm = || Ok::<_, candle_core::Error>(RmsNorm::new((random(&[d])? + 1.0)?, 1e-5));

    // In a trained model `moefy-train convert` has put the neurons in order of importance before this point.
    let dense = Mlp { gate_proj: linear(i, d)?, up_proj: linear(i, d)?, down_proj: linear(d, i)? };
    let widths = dynamoe::config::even_widths(i, 4)?;
    let weight = |linear: &Linear| linear.weight().clone(); // shares the memory
    let matrices = Projections {
        gate_proj: weight(&dense.gate_proj),
        up_proj: weight(&dense.up_proj),
        down_proj: weight(&dense.down_proj),
    };
    let experts = PrefixExperts::new(matrices, Activation::Silu, &widths)?;
    let router = Router::Mlp { fc1: linear(8, d)?, fc2: linear(widths.len() - 1, 8)? };
    let routed = Arc::new(DynaMoeFfn::new(experts, router, None, 1.0)?);

    let mut block = Block {
        norms: [norm()?, norm()?],
        qkv: [linear(d, d)?, linear(d, d)?, linear(d, d)?],
        o_proj: linear(d, d)?,
        mlp: Box::new(dense),
    };
    let x = Tensor::randn(0f32, 1.0, (1, t, d), &Device::Cpu)?;
    let before = block.forward(&x)?;

    // The swap. A closure is a `Module` too; this one leaves us a handle to turn the dial with.
    let ffn = Arc::clone(&routed);
    block.mlp = Box::new(move |x: &Tensor| ffn.forward(x));

    let bits = |y: &Tensor| -> Result<Vec<u32>> {
        Ok(y.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    ensure!(bits(&block.forward(&x)?)? == bits(&before)?, "full width must be the dense block, bit for bit");
    println!("sensitivity 1.00: equals the dense block bit for bit");
    for sensitivity in [0.55, 0.5, 0.45, 0.0] {
        routed.set_sensitivity(sensitivity)?;
        let difference = (block.forward(&x)? - &before)?.abs()?.mean_all()?.to_scalar::<f32>()?;
        println!("sensitivity {sensitivity:.2}: mean |difference| to the dense block {difference:.4}");
    }
    Ok(())
}

#[test]
fn runs() -> Result<()> {
    main()
}
