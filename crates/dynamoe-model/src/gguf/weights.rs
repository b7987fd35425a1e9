//! The tensors of a GGUF file under Hugging Face's names, in its order, as F32, F16 or BF16.

use std::borrow::Cow;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use safetensors::Dtype;

use super::header::{Gguf, Info};
use crate::checkpoint::{CHUNK_BYTES, TensorSpec, Writer, check_finite, to_bytes};
use crate::config::ModelConfig;
use crate::tensors::{EMBEDDING, LM_HEAD, expected_tensors};

/// Names of a layer's tensors: Hugging Face's, and GGUF's.
const LAYER: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// GGUF's embedding, `(V, D)`.
pub(super) const TOKEN_EMBEDDING: &str = "token_embd.weight";
/// GGUF's output matrix, `(V, D)`; absent where it is the embedding.
pub(super) const OUTPUT: &str = "output.weight";
/// Factors by which Llama 3 slows the rotary pairs down, `(d/2)`.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// GGUF's name of a tensor that Hugging Face calls `name`.
pub(super) fn gguf_name(name: &str) -> Option<String> {
    match name {
        EMBEDDING => return Some(TOKEN_EMBEDDING.to_owned()),
        LM_HEAD => return Some(OUTPUT.to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (rest, what) = rest.rsplit_once('.')?;
    let (_, short) = LAYER.iter().find(|(long, _)| *long == rest)?;
    Some(format!("blk.{layer}.{short}.{what}"))
}

/// A tensor on its way from the file to a checkpoint.
pub(super) struct Move<'a> {
    name: String,
    info: &'a Info,
    /// Rows of a head whose halves are interleaved in the file; none where rows stand in order.
    interleaved: Option<usize>,
}

impl Move<'_> {
    /// As it is written: quantized weights as BF16, whose rounding is far below theirs.
    pub fn spec(&self) -> TensorSpec {
        TensorSpec { name: self.name.clone(), dtype: target(self.info.kind), shape: self.info.shape.clone() }
    }
}

fn target(kind: GgmlDType) -> Dtype {
    match kind {
        GgmlDType::F32 => Dtype::F32,
        GgmlDType::F16 => Dtype::F16,
        _ => Dtype::BF16,
    }
}

/// What has to be moved for a model of this configuration. `interleaved` says whether each head's rows of q and k are
/// stored as the pairs that are rotated together, as llama.cpp stores a Llama's.
///
/// # Errors
/// A tensor that is missing, of another shape, or of no known use.
pub(super) fn moves<'a>(gguf: &'a Gguf, config: &ModelConfig, interleaved: bool) -> Result<Vec<Move<'a>>> {
    let file = gguf.path.display();
    let mut moves = Vec::new();
    let mut used = vec![ROPE_FACTORS.to_owned()];
    for (name, shape) in expected_tensors(config) {
        let theirs = gguf_name(&name).with_context(|| format!("{name} has no name in GGUF"))?;
        let Some(info) = gguf.tensors.get(&theirs) else {
            bail!("{file}: tensor {theirs} is missing: the file is not whole, make or fetch it again")
        };
        ensure!(
            info.shape == shape,
            "{file}: tensor {theirs}: expected shape {shape:?} by the metadata, found {:?}",
            info.shape
        );
        let rotated = name.contains("self_attn.q_proj") || name.contains("self_attn.k_proj");
        moves.push(Move { name, info, interleaved: (interleaved && rotated).then_some(config.head_dim) });
        used.push(theirs);
    }
    if let Some(name) = gguf.tensors.keys().find(|name| !used.contains(name)) {
        bail!(
            "{file}: tensor {name} is none of a {}'s: the model is another one",
            config.architecture.name()
        );
    }
    Ok(moves)
}

/// Dequantizes a tensor and appends it to what is written, some rows at a time.
///
/// # Errors
/// A failed read or write; a value that is not finite.
pub(super) fn copy(gguf: &Gguf, tensor: &Move<'_>, writer: &mut Writer) -> Result<()> {
    let Move { name, info, interleaved } = tensor;
    let (rows, columns) = match (info.shape.as_slice(), interleaved) {
        (&[rows], Some(_)) => (rows, 1),
        (shape, _) => {
            let columns = shape.last().copied().unwrap_or(1);
            (shape[..shape.len() - 1].iter().product(), columns)
        }
    };
    let row_bytes = columns / info.kind.block_size() * info.kind.type_size();
    let at_once = interleaved.unwrap_or((CHUNK_BYTES / (4 * columns.max(1))).max(1));
    let dtype = target(info.kind);
    for first in (0..rows).step_by(at_once) {
        let count = at_once.min(rows - first);
        let mut stored = vec![0; count * row_bytes];
        let start = info.start + (first * row_bytes) as u64;
        gguf.file
            .read_exact_at(&mut stored, start)
            .with_context(|| format!("{}: reading tensor {name}", gguf.path.display()))?;
        let mut bytes =
            dequantize(stored, info.kind, count * columns).with_context(|| format!("tensor {name}"))?;
        if interleaved.is_some() {
            bytes = pairs_to_halves(&bytes, count);
        }
        check_finite(name, &bytes, dtype, &info.shape, first * columns)
            .with_context(|| gguf.path.display().to_string())?;
        writer.push(name, &bytes)?;
    }
    Ok(())
}

/// `count` numbers in the type that they are written in.
fn dequantize(stored: Vec<u8>, kind: GgmlDType, count: usize) -> Result<Vec<u8>> {
    if matches!(kind, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16) {
        return Ok(stored);
    }
    // borrowed: candle reads what it owns after it has freed it
    let storage = QStorage::from_data(Cow::Borrowed(&stored), &Device::Cpu, kind)?;
    let blocks = QTensor::new(storage, count)?;
    to_bytes(&blocks.dequantize(&Device::Cpu)?, target(kind))
}

/// The rows of one head from GGUF's order, where row `2 i + j` is row `i` of half `j`, to Hugging Face's, half by half.
fn pairs_to_halves(rows: &[u8], count: usize) -> Vec<u8> {
    let row = rows.len() / count;
    let half = |j: usize| (0..count / 2).flat_map(move |i| &rows[(2 * i + j) * row..][..row]);
    half(0).chain(half(1)).copied().collect()
}

/// A small tensor of F32, whole.
///
/// # Errors
/// One of another type; a failed read.
pub(super) fn numbers(gguf: &Gguf, name: &str) -> Result<Vec<f32>> {
    let info = gguf.tensors.get(name).filter(|info| info.kind == GgmlDType::F32);
    let len = info.and_then(Info::len).filter(|&len| len <= CHUNK_BYTES as u64);
    let (Some(info), Some(len)) = (info, len) else {
        bail!("{}: tensor {name}: expected some numbers of type F32", gguf.path.display())
    };
    let mut bytes = vec![0; len as usize];
    gguf.file
        .read_exact_at(&mut bytes, info.start)
        .with_context(|| format!("{}: reading tensor {name}", gguf.path.display()))?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}
