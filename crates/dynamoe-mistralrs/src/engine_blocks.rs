//! Reads the blocks of a quantized projection that the engine keeps private: out of the bytes that it serializes for
//! UQFF files.
//!
//! ```text
//! u32 version · u8 kind (0: ggml's) · u32 bytes · u8 has bias · u32 type · u32 dimensions · u32 each · blocks
//! and with a bias: u32 bytes · u32 type · u32 dimensions · u32 each · numbers
//! ```

use candle_core::{
    DType, Device, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml},
};
use mistralrs_quant::QuantizedSerdeType;

/// The version of the layout above, without its patch level: 0.2.
const VERSION: usize = 2;

/// A quantized matrix of the engine.
pub(crate) struct EngineBlocks {
    /// The matrix `(out, in)`.
    pub weight: QTensor,
    /// `(out)`, in f32.
    pub bias: Option<Tensor>,
}

impl EngineBlocks {
    /// Reads a serialized projection onto `device`. Returns nothing if it is of a type that dynamoe's kernels do not
    /// know, or too large for the layout's 32 bits.
    ///
    /// # Errors
    /// Bytes of another version of the layout; bytes that end early.
    pub fn read(serialized: &[u8], device: &Device) -> Result<Option<Self>> {
        let mut reader = Reader { bytes: serialized, at: 0 };
        let version = reader.u32()?;
        if version >> 8 != VERSION {
            bail!(
                "the engine serializes projections in version {}.{}.{}, expected 0.{VERSION}: \
                 dynamoe-mistralrs was written for another mistralrs-quant",
                version >> 16,
                version >> 8 & 0xff,
                version & 0xff
            )
        }
        if reader.u8()? != QuantizedSerdeType::Gguf as u8 {
            return Ok(None);
        }
        let (len, has_bias, number) = (reader.u32()?, reader.u8()? == 1, reader.u32()?);
        let dims = reader.dims()?;
        let Some(dtype) = ggml_type(number) else { return Ok(None) };
        let blocks = reader.take(len)?;
        // the length of a matrix of more than 4 GiB does not fit
        let elements: usize = dims.iter().product();
        if dims.len() != 2 || elements / dtype.block_size() * dtype.type_size() != len {
            return Ok(None);
        }
        let weight = qtensor_from_ggml(dtype, blocks, dims, device)?;
        let bias = if has_bias { Some(reader.bias(device)?) } else { None };
        Ok(Some(Self { weight, bias }))
    }
}

/// ggml's number of a type that dynamoe's kernels know.
fn ggml_type(number: usize) -> Option<GgmlDType> {
    use GgmlDType::{F32, Q4_0, Q4K, Q5K, Q6K, Q8_0};
    let numbers = [(0, F32), (2, Q4_0), (8, Q8_0), (12, Q4K), (13, Q5K), (14, Q6K)];
    numbers.iter().find(|(n, _)| *n == number).map(|(_, dtype)| *dtype)
}

/// The engine's number of a type that a bias may have.
fn bias_type(number: usize) -> Option<DType> {
    let numbers = [(4, DType::F16), (5, DType::BF16), (6, DType::F32)];
    numbers.iter().find(|(n, _)| *n == number).map(|(_, dtype)| *dtype)
}

/// Reads on from `at`.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let end = self.at.saturating_add(len);
        let Some(taken) = self.bytes.get(self.at..end) else {
            bail!("a serialized projection has {} bytes, expected at least {end}", self.bytes.len())
        };
        self.at = end;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<usize> {
        let mut number = [0; 4];
        number.copy_from_slice(self.take(4)?);
        Ok(u32::from_le_bytes(number) as usize)
    }

    fn dims(&mut self) -> Result<Vec<usize>> {
        (0..self.u32()?).map(|_| self.u32()).collect()
    }

    fn bias(&mut self, device: &Device) -> Result<Tensor> {
        let (len, number) = (self.u32()?, self.u32()?);
        let dims = self.dims()?;
        let Some(dtype) = bias_type(number) else {
            bail!("a serialized projection has a bias of type {number}, expected F16, BF16 or F32")
        };
        let numbers = self.take(len)?;
        if dims.iter().product::<usize>() * dtype.size_in_bytes() != len {
            bail!("a serialized projection has a bias of shape {dims:?} in {len} bytes")
        }
        Tensor::from_raw_buffer(numbers, dtype, &dims, device)?.to_dtype(DType::F32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::projection::tests::{quantized, random};

    #[test]
    fn a_projection_is_read_as_the_engine_wrote_it() {
        let (weight, bias) = (random(3, 64), random(1, 3).flatten_all().unwrap());
        for bias in [None, Some(bias)] {
            let engines = quantized(&weight, GgmlDType::Q8_0, bias.clone());
            let read = EngineBlocks::read(&engines.serialize().unwrap(), &Device::Cpu).unwrap().unwrap();
            let blocks = QTensor::quantize(&weight, GgmlDType::Q8_0).unwrap();
            assert_eq!(read.weight.data().unwrap(), blocks.data().unwrap());
            let numbers = |bias: Option<Tensor>| bias.map(|bias| bias.to_vec1::<f32>().unwrap());
            assert_eq!(numbers(read.bias), numbers(bias));
        }
    }

    #[test]
    fn serialized_projections_that_end_early_are_refused() {
        let bias = random(1, 2).flatten_all().unwrap();
        let projection = quantized(&random(2, 64), GgmlDType::Q8_0, Some(bias));
        let bytes = projection.serialize().unwrap().into_owned();
        assert!(EngineBlocks::read(&bytes, &Device::Cpu).unwrap().is_some());
        for len in 0..bytes.len() {
            assert!(EngineBlocks::read(&bytes[..len], &Device::Cpu).is_err(), "{len}");
        }
    }

    #[test]
    fn another_version_of_the_layout_is_refused_and_named() {
        let projection = quantized(&random(2, 64), GgmlDType::Q8_0, None);
        let mut bytes = projection.serialize().unwrap().into_owned();
        for (place, version) in [(1, "0.3.0"), (2, "1.2.0")] {
            bytes[place] += 1;
            let error = EngineBlocks::read(&bytes, &Device::Cpu).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(version), "{error}");
            bytes[place] -= 1;
        }
        bytes[0] += 1; // a patch level
        assert!(EngineBlocks::read(&bytes, &Device::Cpu).unwrap().is_some());
    }
}
