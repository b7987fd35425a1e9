//! Times beside cuBLAS's, and beside what the card can copy and multiply.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaGraph;
use candle_core::cuda_backend::cudarc::driver::sys::{
    CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode,
};
use candle_core::quantized::GgmlDType;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use dynamoe_kernels::cuda::{self, Routed, Segments, Thresholds, Weight};
use dynamoe_kernels::plan::{Float, Many, Tile};
use dynamoe_kernels::{args, segments};
use rand::Rng;

use crate::check::kernels;
use crate::weights::{Format, Matrix, RouterWeights, routed, segment};

const SHAPES: [(&str, usize, usize); 3] =
    [("Llama-3.2-1B", 2048, 8192), ("Qwen3-4B", 2560, 9728), ("Mistral-7B", 4096, 14336)];
const TOKENS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 512, 2048];
const EXPERTS: usize = 4;
const ROUTER_SIZE: usize = 64;
/// Bytes of weights that exceed every cache: a round takes as many layers as make this many.
const COLD_BYTES: usize = 512 << 20;
const REPEATS: usize = 7;

/// Microseconds: median, and the span from the fastest to the slowest.
#[derive(Debug, Clone, Copy)]
struct Time {
    median: f64,
    low: f64,
    high: f64,
}

/// Times one call of `work(layer)`, of those for `layers` layers in one graph.
fn time(device: &CudaDevice, layers: usize, work: &mut dyn FnMut(usize) -> Result<()>) -> Result<Time> {
    let stream = device.cuda_stream();
    work(0)?; // loads modules, makes handles
    stream.synchronize().w()?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED).w()?;
    let captured = (0..layers).try_for_each(&mut *work);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    captured?;
    let Some(graph) = graph.w()? else { bail!("nothing was captured") };
    let launch = |graph: &CudaGraph| graph.launch().w();
    for _ in 0..3 {
        launch(&graph)?;
    }
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w();
        let start = event()?;
        launch(&graph)?;
        let end = event()?;
        times.push(f64::from(start.elapsed_ms(&end).w()?) * 1e3 / layers as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(Time { median: times[REPEATS / 2], low: times[0], high: times[REPEATS - 1] })
}

/// What the card does at best, measured.
struct Card {
    /// Bytes read and written in a microsecond.
    copy: f64,
    /// Operations of a large GEMM in bf16 in a microsecond.
    multiply: f64,
}

impl Card {
    fn measure(device: &Device, cuda: &CudaDevice) -> Result<Self> {
        let bytes = 1 << 30;
        let from = Tensor::zeros(bytes / 4, DType::F32, device)?;
        let copy = time(cuda, 4, &mut |_| from.copy().map(drop))?;
        let n = 8192;
        let a = Tensor::rand(-1f32, 1f32, (n, n), device)?.to_dtype(DType::BF16)?;
        let multiply = time(cuda, 4, &mut |_| a.matmul(&a.t()?).map(drop))?;
        let card = Self {
            copy: 2.0 * bytes as f64 / copy.median,
            multiply: 2.0 * (n * n * n) as f64 / multiply.median,
        };
        println!("copy: {:.2} TB/s, bf16 GEMM of {n}: {:.0} Tflop/s", card.copy / 1e6, card.multiply / 1e6);
        Ok(card)
    }
}

pub fn run(device: &Device) -> Result<Vec<String>> {
    let Device::Cuda(cuda) = device else { bail!("expected a CUDA device") };
    let card = Card::measure(device, cuda)?;
    let mut lines = Vec::new();
    for (name, d, i) in SHAPES {
        for format in
            [Format::Float(DType::BF16), Format::Blocks(GgmlDType::Q4K), Format::Blocks(GgmlDType::Q8_0)]
        {
            let bench = Bench::new(device, cuda, &card, name, [d, i], format)?;
            for tokens in TOKENS {
                // a failure, such as a library operation that cannot be captured, must not end the other measurements
                if let Err(error) = bench.tokens(tokens, &mut lines) {
                    println!("{tokens:4}  not timed to the end: {error}");
                }
            }
        }
    }
    Ok(lines)
}

/// The label in front of a width if the kernels are not the default ones.
fn label(many: Option<Many>) -> &'static str {
    match many {
        None => "",
        Some(Many::Few) => "few ",
        Some(Many::Tiles([Tile::Mma, _])) => "mma ",
        Some(Many::Tiles([Tile::Wgmma128, _])) => "wgmma128 ",
        Some(Many::Tiles([Tile::Wgmma256, _])) => "wgmma256 ",
    }
}

struct Bench<'a> {
    device: &'a Device,
    cuda: &'a CudaDevice,
    card: &'a Card,
    model: &'a str,
    d: usize,
    widths: Vec<usize>,
    format: Format,
    layers: Vec<[Matrix; 3]>,
    /// Separate weights for half of the neurons, for each layer.
    separate: Vec<[Matrix; 3]>,
    router: RouterWeights,
    compensation: Tensor,
}

impl<'a> Bench<'a> {
    fn new(
        device: &'a Device,
        cuda: &'a CudaDevice,
        card: &'a Card,
        model: &'a str,
        [d, i]: [usize; 2],
        format: Format,
    ) -> Result<Self> {
        // even the narrowest expert's weights have to be cold
        let narrowest = format.bytes(3 * d * i) / EXPERTS;
        let layers = COLD_BYTES.div_ceil(narrowest).min(24);
        let of_neurons = |n| {
            let matrix = |shape| Matrix::unseen(shape, 0.02, format, device);
            Ok::<_, candle_core::Error>([matrix((n, d))?, matrix((n, d))?, matrix((d, n))?])
        };
        let separate = EXPERTS / 2 * i / EXPERTS;
        println!("\n{model}, D {d}, I {i}, {}, {layers} layers in turn", format.name());
        println!("   T           width        µs     (span)  dense   GB/s  copy  Tflop/s  GEMM");
        Ok(Self {
            device,
            cuda,
            card,
            model,
            d,
            widths: (1..=EXPERTS).map(|e| e * i / EXPERTS).collect(),
            format,
            layers: (0..layers).map(|_| of_neurons(i)).collect::<Result<_>>()?,
            separate: (0..layers).map(|_| of_neurons(separate)).collect::<Result<_>>()?,
            router: RouterWeights::random(d, ROUTER_SIZE, EXPERTS, device)?,
            compensation: Tensor::zeros((EXPERTS - 1, d), DType::F32, device)?,
        })
    }

    fn tokens(&self, tokens: usize, lines: &mut Vec<String>) -> Result<()> {
        let x =
            Tensor::rand(-1f32, 1f32, (tokens, self.d), self.device)?.to_dtype(self.format.activations())?;
        let dense = time(self.cuda, self.layers.len(), &mut |layer| self.dense(layer, &x))?;
        let full = vec![EXPERTS as u32 - 1; tokens];
        self.report(("dense", tokens), self.work(&full, false), [dense; 2], lines);
        let mixed: Vec<u32> = (0..tokens).map(|_| rand::rng().random_range(0..EXPERTS as u32)).collect();
        // what runs by default, then each of the kernels that could
        let mut choices = vec![None];
        let all = kernels(self.device, tokens, self.format)?;
        choices.extend(all.into_iter().filter(Option::is_some));
        for many in choices {
            let what = label(many);
            for expert in 0..EXPERTS as u32 {
                let name = format!("{what}{:.2}", f64::from(expert + 1) / EXPERTS as f64);
                self.fixed((&name, many, false), &x, &vec![expert; tokens], dense, lines)?;
            }
            if tokens > 1 {
                self.fixed((&format!("{what}mixed"), many, false), &x, &mixed, dense, lines)?;
                self.fixed((&format!("{what}separate"), many, true), &x, &mixed, dense, lines)?;
            }
        }
        let route = time(self.cuda, self.layers.len(), &mut |_| {
            cuda::route(&x, &self.router.view(), Thresholds::All(0.0), &self.widths).map(drop)
        })?;
        let router = 4 * ROUTER_SIZE * self.d + tokens * self.d * self.format.activations().size_in_bytes();
        let flops = 2 * tokens * ROUTER_SIZE * self.d;
        self.report(("route", tokens), (router, flops), [route, dense], lines);
        Ok(())
    }

    fn fixed(
        &self,
        (name, many, separate): (&str, Option<Many>, bool),
        x: &Tensor,
        experts: &[u32],
        dense: Time,
        lines: &mut Vec<String>,
    ) -> Result<()> {
        let to: Routed = routed(experts, &self.widths, self.device)?;
        let of_layer = |(dense, other): (&[Matrix; 3], &[Matrix; 3])| Segments {
            dense: vec![segment(dense)],
            separate: separate.then(|| segment(other)).into_iter().collect(),
        };
        let segments: Vec<_> = self.layers.iter().zip(&self.separate).map(of_layer).collect();
        let took = time(self.cuda, self.layers.len(), &mut |layer| {
            cuda::forward_as(x, &segments[layer], Some(&self.compensation), &to, many).map(drop)
        })?;
        self.report((name, experts.len()), self.work(experts, separate), [took, dense], lines);
        Ok(())
    }

    /// Bytes that have to be read and written at least (weights that any token needs, and activations; `h` may stay in a
    /// cache), and operations.
    fn work(&self, experts: &[u32], separate: bool) -> (usize, usize) {
        let widths: Vec<u32> = experts.iter().map(|&e| self.widths[e as usize] as u32).collect();
        let run = |neurons: usize| args::Segment { end: neurons as u32, ..args::Segment::default() };
        let [all, half] = [EXPERTS, EXPERTS / 2].map(|e| run(self.widths[e - 1]));
        // units matter for addresses, of which there are none
        let list = segments::list(&[all], &[half][..usize::from(separate)], [Float::F32.into(); 2]);
        let read = segments::neurons_read(&list, &widths) as usize;
        let activations = 2 * experts.len() * self.d * self.format.activations().size_in_bytes();
        let neurons: usize = widths.iter().map(|&w| w as usize).sum();
        (self.format.bytes(3 * self.d * read) + activations, 6 * self.d * neurons)
    }

    /// The dense FFN of candle's operations: cuBLAS, or candle's own kernels for blocks.
    fn dense(&self, layer: usize, x: &Tensor) -> Result<()> {
        let project = |x: &Tensor, m: usize| match &self.layers[layer][m].weight {
            Weight::Float(weight) => x.matmul(&weight.t()?),
            Weight::Quantized(weight) => {
                let multiply = candle_core::quantized::QMatMul::QTensor(weight.clone());
                candle_core::Module::forward(&multiply, &x.to_dtype(DType::F32)?)
            }
        };
        let h = (project(x, 0)?.silu()? * project(x, 1)?)?;
        project(&h, 2).map(drop)
    }

    fn report(
        &self,
        (name, tokens): (&str, usize),
        (bytes, flops): (usize, usize),
        [took, dense]: [Time; 2],
        lines: &mut Vec<String>,
    ) {
        let (rate, speed) = (bytes as f64 / took.median, flops as f64 / took.median);
        println!(
            "{tokens:4}  {name:>14}  {:8.1}  ({:.1}-{:.1})  {:.3}  {:6.0}  {:.2}  {:7.1}  {:.2}",
            took.median,
            took.low,
            took.high,
            took.median / dense.median,
            rate / 1e3,
            rate / self.card.copy,
            speed / 1e6,
            speed / self.card.multiply,
        );
        lines.push(format!(
            "{{\"model\":\"{}\",\"weights\":\"{}\",\"tokens\":{tokens},\"what\":\"{name}\",\"us\":{:.3},\"us_low\":{:.3},\
             \"us_high\":{:.3},\"dense_us\":{:.3},\"bytes\":{bytes},\"flops\":{flops},\"copy_bytes_per_us\":{:.0},\
             \"gemm_flops_per_us\":{:.0}}}",
            self.model,
            self.format.name(),
            took.median,
            took.low,
            took.high,
            dense.median,
            self.card.copy,
            self.card.multiply,
        ));
    }
}
