//! The optimizer's moments on disk: one safetensors file of all of them, whatever the number of ranks.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use dynamoe_model::Params;
use dynamoe_model::checkpoint::{TensorSpec, Writer};
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::optimizer::AdamW;
use crate::ranks::Ranks;

/// Writes the moments of all ranks into the new file `path`, one tensor at a time. All ranks take part; the first one writes.
///
/// # Errors
/// The file system's.
pub(super) fn write(path: &Path, params: &Params, optimizer: &AdamW, ranks: &dyn Ranks) -> Result<()> {
    let spec = |(name, var): (&str, &candle_core::Var)| {
        ["m", "v"].map(|suffix| TensorSpec {
            name: format!("{name}.{suffix}"),
            dtype: Dtype::F32,
            shape: var.dims().to_vec(),
        })
    };
    let create = || Writer::create_file(path.to_owned(), params.iter().flat_map(spec).collect());
    let mut writer = ranks.is_first().then(create).transpose()?;
    for moments in optimizer.state() {
        for (name, moment) in moments? {
            let all = ranks.gather(moment.to_device(&Device::Cpu)?.to_vec1()?);
            if let Some(writer) = &mut writer {
                let len = all.len();
                writer.push_tensor(&name, &Tensor::from_vec(all, len, &Device::Cpu)?, Dtype::F32)?;
            }
        }
    }
    writer.map_or(Ok(()), Writer::finish)
}

/// A file of moments, of which each rank reads its shard.
pub(super) struct MomentsFile {
    file: File,
    metadata: Metadata,
    /// Where the header ends.
    data: u64,
}

impl MomentsFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact_at(&mut length, 0)?;
        let data = u64::from_le_bytes(length).saturating_add(8);
        ensure!(data <= file.metadata()?.len(), "the header is cut off");
        let mut header = vec![0; data as usize - length.len()];
        file.read_exact_at(&mut header, length.len() as u64)?;
        let metadata = serde_json::from_slice(&header)?;
        Ok(Self { file, metadata, data })
    }

    /// The numbers `range` of a tensor, (range).
    pub(super) fn read(&self, name: &str, range: Range<usize>, device: &Device) -> Result<Tensor> {
        let info = self.metadata.info(name).with_context(|| format!("no tensor {name}"))?;
        let (start, end) = info.data_offsets;
        ensure!(info.dtype == Dtype::F32, "{name}: expected F32, found {}", info.dtype);
        ensure!(start + 4 * range.end <= end, "{name}: expected {} numbers or more", range.end);
        let mut bytes = vec![0; 4 * range.len()];
        self.file.read_exact_at(&mut bytes, self.data + (start + 4 * range.start) as u64)?;
        let tensor = Tensor::from_raw_buffer(&bytes, candle_core::DType::F32, &[range.len()], device)?;
        Ok(tensor)
    }

    /// The shape of a tensor; none where it is not there.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        Some(&self.metadata.info(name)?.shape)
    }
}
