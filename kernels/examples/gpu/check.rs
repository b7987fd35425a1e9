//! Every kernel against its reference.

use candle_core::cuda_backend::WrapErr;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Result, Tensor, bail};
use dynamoe_kernels::cuda::{self, Segments, Thresholds};
use dynamoe_kernels::plan::{DECODE_TOKENS, FEW_TOKENS, Many, Tile};
use dynamoe_kernels::reference::{self, Ffn, Matrix as View, Route, Weights};
use rand::Rng;

use crate::weights::{Format, Matrix, RouterWeights, routed, segment, to_f64};

const TOKENS: [usize; 11] = [1, 2, 3, 7, 8, 9, 17, 64, 65, 130, 513];

pub fn run(device: &Device) -> Result<()> {
    for tokens in TOKENS {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            router(device, tokens, dtype)?;
        }
    }
    println!("router: equal to the reference");
    let floats = [DType::F32, DType::F16, DType::BF16].map(Format::Float);
    let blocks = [GgmlDType::Q4K, GgmlDType::Q8_0].map(Format::Blocks);
    for format in floats.into_iter().chain(blocks) {
        let mut largest = 0f64;
        for tokens in TOKENS {
            for many in kernels(device, tokens, format)? {
                for mix in ["narrow", "wide", "mixed"] {
                    for (shells, separate) in [(false, 0), (true, 0), (false, 1), (true, 2)] {
                        let case = Case { tokens, format, mix, shells, separate, many };
                        largest = largest.max(case.run(device)?);
                    }
                }
            }
        }
        println!("FFN in {}: equal to the reference, at most {largest:.2} of the tolerance", format.name());
    }
    Ok(())
}

fn router(device: &Device, tokens: usize, dtype: DType) -> Result<()> {
    let (d, r, widths) = (584, 48, [64, 128, 192, 256]);
    let weights = RouterWeights::random(d, r, widths.len(), device)?;
    let x = Tensor::rand(-2f32, 2f32, (tokens, d), device)?.to_dtype(dtype)?;
    let thresholds: Vec<f32> = (0..tokens).map(|_| rand::rng().random_range(-1.0..1.0)).collect();
    let on_device = Tensor::new(thresholds.as_slice(), device)?;
    let found = cuda::route(&x, &weights.view(), Thresholds::Each(&on_device), &widths)?;
    let (experts, of_width) = (found.experts.to_vec1::<u32>()?, found.widths.to_vec1::<u32>()?);
    let [x, fc1, fc1_bias, fc2, fc2_bias] =
        [&x, &weights.fc1, &weights.fc1_bias, &weights.fc2, &weights.fc2_bias].map(to_f64);
    let (x, fc1, fc1_bias, fc2, fc2_bias) = (x?, fc1?, fc1_bias?, fc2?, fc2_bias?);
    let view = |data, stride| View { data, stride };
    let route = Route {
        x: view(&x, d),
        fc1: view(&fc1, d),
        fc1_bias: &fc1_bias,
        fc2: view(&fc2, r),
        fc2_bias: &fc2_bias,
        tokens,
        hidden_size: d,
    };
    for (token, logits) in route.logits().iter().enumerate() {
        let threshold = f64::from(thresholds[token]);
        let choose =
            |margin: f64| logits.iter().position(|&l| l + margin >= threshold).unwrap_or(logits.len()) as u32;
        let expert = experts[token];
        if ![0.0, 1e-4, -1e-4].map(choose).contains(&expert)
            || of_width[token] != widths[expert as usize] as u32
        {
            bail!(
                "router, {dtype:?}, token {token} of {tokens}: found {expert}, logits {logits:?}, {threshold}"
            );
        }
    }
    Ok(())
}

/// The kernels that can run this many tokens on this device: only the default one if there is no choice.
pub fn kernels(device: &Device, tokens: usize, format: Format) -> Result<Vec<Option<Many>>> {
    let Device::Cuda(cuda) = device else { bail!("expected a CUDA device") };
    let halves = matches!(format, Format::Float(DType::F16 | DType::BF16));
    if !halves || tokens <= DECODE_TOKENS {
        return Ok(vec![None]);
    }
    let mut all = vec![Many::Tiles([Tile::Mma; 2])];
    if cuda.cuda_stream().context().compute_capability().w()?.0 == 9 {
        all.extend([Tile::Wgmma128, Tile::Wgmma256].map(|tile| Many::Tiles([tile; 2])));
    }
    if tokens <= FEW_TOKENS {
        all.push(Many::Few);
    }
    Ok(all.into_iter().map(Some).collect())
}

#[derive(Debug)]
struct Case {
    tokens: usize,
    format: Format,
    mix: &'static str,
    /// Whether shells are matrices of their own.
    shells: bool,
    /// For how many shells tokens below full width have separate weights.
    separate: usize,
    many: Option<Many>,
}

/// gate_proj, up_proj and down_proj of matrices one behind the other, `weight` of each number.
fn whole(pieces: &[[Matrix; 3]], d: usize, weight: &dyn Fn(f64) -> f64) -> [Vec<f64>; 3] {
    let stack = |m: usize| -> Vec<f64> {
        pieces.iter().flat_map(|p| p[m].values.iter().map(|&w| weight(w))).collect()
    };
    let row = |r: usize| {
        let of =
            move |p: &[Matrix; 3]| p[2].values[p[2].values.len() / d * r..][..p[2].values.len() / d].to_vec();
        pieces.iter().flat_map(of).map(weight)
    };
    [stack(0), stack(1), (0..d).flat_map(row).collect()]
}

fn weights([gate, up, down]: &[Vec<f64>; 3], d: usize) -> Weights<'_> {
    let view = |data, stride| View { data, stride };
    let neurons = gate.len() / d;
    Weights { gate_proj: view(gate, d), up_proj: view(up, d), down_proj: view(down, neurons), neurons }
}

impl Case {
    /// Returns the largest error as a share of the bound.
    fn run(&self, device: &Device) -> Result<f64> {
        let &Self { tokens, format, mix, shells, separate, many } = self;
        let quantized = matches!(format, Format::Blocks(_));
        let (d, widths) = if quantized { (512, vec![256, 768, 1024]) } else { (328, vec![72, 136, 400]) };
        let pieces = |widths: &[usize]| {
            let mut start = 0;
            let skipped = if shells { 0 } else { widths.len().saturating_sub(1) };
            let piece = |&end: &usize| {
                let n = end - std::mem::replace(&mut start, end);
                let weight = 2.0 / (d as f64).sqrt();
                Ok([
                    Matrix::random((n, d), weight, format, device)?,
                    Matrix::random((n, d), weight, format, device)?,
                    Matrix::random((d, n), 1.0, format, device)?,
                ])
            };
            widths.iter().skip(skipped).map(piece).collect::<Result<Vec<_>>>()
        };
        let (dense, separate) = (pieces(&widths)?, pieces(&widths[..separate])?);
        let largest = widths.len() as u32 - 1;
        let expert = |_| match mix {
            "narrow" => 0,
            "wide" => largest,
            _ => rand::rng().random_range(0..=largest),
        };
        let experts: Vec<u32> = (0..tokens).map(expert).collect();
        let dtype = format.activations();
        // rows of a wider matrix, so that strides are not lengths
        let x = Tensor::rand(-2f32, 2f32, (tokens, d + 8), device)?.to_dtype(dtype)?.narrow(1, 0, d)?;
        let compensation = Tensor::rand(-1f32, 1f32, (widths.len() - 1, d), device)?;
        let [of_dense, of_separate] = [&dense, &separate].map(|p| p.iter().map(segment).collect());
        let segments = Segments { dense: of_dense, separate: of_separate };
        let y =
            cuda::forward_as(&x, &segments, Some(&compensation), &routed(&experts, &widths, device)?, many)?;

        // decoding with blocks quantizes activations; prefill unpacks weights to the activations' type
        let requantizes = quantized && tokens <= DECODE_TOKENS;
        let round = |x: f64| match dtype {
            _ if requantizes => f64::from(x as f32),
            DType::F16 => half::f16::from_f64(x).to_f64(),
            DType::BF16 => half::bf16::from_f64(x).to_f64(),
            _ => f64::from(x as f32),
        };
        let weight = |w: f64| if requantizes { w } else { round(w) };
        let [dense, separate] = [&dense, &separate].map(|pieces| whole(pieces, d, &weight));
        let mut seen = to_f64(&x)?;
        if requantizes {
            seen = reference::requantize(&seen);
        }
        let compensation = to_f64(&compensation)?;
        let ffn = Ffn {
            x: View { data: &seen, stride: d },
            dense: weights(&dense, d),
            separate: (!separate[0].is_empty()).then(|| weights(&separate, d)),
            compensation: &compensation,
            experts: &experts,
            expert_widths: &widths,
            hidden_size: d,
        };
        let epsilon = match dtype {
            DType::F32 => 6e-8,
            DType::F16 => 4.9e-4,
            _ => 3.9e-3,
        };
        let mut worst = 0f64;
        for (token, found) in to_f64(&y)?.chunks(d).enumerate() {
            let mut h = ffn.hidden(token, &round);
            let ranges = ffn.hidden_range(token, &round);
            if requantizes {
                h = reference::requantize(&h);
            }
            for (column, (found, expected)) in found.iter().zip(ffn.output(token, &h)).enumerate() {
                let row = &ffn.down(token, column, h.len());
                // A number of h may round the other way. If h is quantized to 8 bits, its step is 1/127 of the largest
                // number in its block, and one such number, times its weight, is what y may be off by.
                let largest = |v: &[f64]| v.iter().fold(0f64, |m, x| m.max(x.abs()));
                let noise = if requantizes {
                    largest(&h) * largest(row) / 127.0
                } else {
                    ranges.iter().zip(row).map(|([low, high], w)| (high - low) * w.abs()).sum()
                };
                let allowed = epsilon * expected.abs() + noise + ffn.output_error(token, column, &h);
                let share = (found - expected).abs() / allowed;
                if share.is_nan() || share > 1.0 {
                    bail!(
                        "{self:?}, token {token}, column {column}: found {found}, expected {expected} ± {allowed}"
                    );
                }
                worst = worst.max(share);
            }
        }
        Ok(worst)
    }
}
