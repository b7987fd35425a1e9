//! Tensors as kernels see them: an address and a stride, checked.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, WrapErr as _};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::args::Address;
use crate::plan::Float;

/// The device of a CUDA tensor.
pub(super) fn device_of(tensor: &Tensor, name: &str) -> Result<CudaDevice> {
    match tensor.device() {
        Device::Cuda(device) => Ok(device.clone()),
        other => bail!("{name}: expected a tensor on a CUDA device, found {:?}", other.location()),
    }
}

pub(super) fn float_of(tensor: &Tensor, name: &str) -> Result<Float> {
    match tensor.dtype() {
        DType::F32 => Ok(Float::F32),
        DType::F16 => Ok(Float::F16),
        DType::BF16 => Ok(Float::Bf16),
        other => bail!("{name}: expected f32, f16 or bf16, found {other:?}"),
    }
}

/// Rows of equal length at multiples of 16 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub address: Address,
    /// In elements.
    pub stride: u32,
}

/// `tensor (rows, columns)` of type `dtype`, of any stride between rows.
pub(super) fn rows(tensor: &Tensor, name: &str, dtype: DType, shape: [usize; 2]) -> Result<Rows> {
    if tensor.dims() != shape || tensor.dtype() != dtype {
        bail!("{name}: expected {dtype:?} {shape:?}, found {:?} {:?}", tensor.dtype(), tensor.dims());
    }
    let [stride, column] = [tensor.stride()[0], tensor.stride()[1]];
    let address = address(tensor, name)?;
    let aligned = |bytes: u64| bytes.is_multiple_of(16);
    let pitch = (stride * dtype.size_in_bytes()) as u64;
    if shape[1] > 1 && column != 1 || !aligned(address) || shape[0] > 1 && !aligned(pitch) {
        bail!(
            "{name}: expected rows that start at multiples of 16 bytes, found strides {:?}",
            tensor.stride()
        );
    }
    Ok(Rows { address, stride: stride as u32 })
}

/// A tensor without gaps.
pub(super) fn contiguous(tensor: &Tensor, name: &str, dtype: DType, shape: &[usize]) -> Result<Address> {
    if tensor.dims() != shape || tensor.dtype() != dtype || !tensor.is_contiguous() {
        bail!(
            "{name}: expected contiguous {dtype:?} {shape:?}, found {:?} {:?} with strides {:?}",
            tensor.dtype(),
            tensor.dims(),
            tensor.stride()
        );
    }
    address(tensor, name)
}

fn address(tensor: &Tensor, name: &str) -> Result<Address> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else {
        bail!("{name}: expected a tensor on a CUDA device, found {:?}", tensor.device().location());
    };
    fn of<T: CudaDType>(storage: &CudaStorage) -> Result<Address> {
        let slice = storage.as_cuda_slice::<T>()?;
        Ok(slice.device_ptr(slice.stream()).0)
    }
    let start = match tensor.dtype() {
        DType::F32 => of::<f32>(storage)?,
        DType::F16 => of::<f16>(storage)?,
        DType::BF16 => of::<bf16>(storage)?,
        DType::U32 => of::<u32>(storage)?,
        other => bail!("{name}: expected f32, f16, bf16 or u32, found {other:?}"),
    };
    Ok(start + (layout.start_offset() * tensor.dtype().size_in_bytes()) as Address)
}

/// Memory for what a kernel writes.
pub(super) struct Scratch<T>(CudaSlice<T>);

impl<T: DeviceRepr + CudaDType> Scratch<T> {
    pub fn new(device: &CudaDevice, len: usize) -> Result<Self> {
        // SAFETY: a kernel writes every number that another one reads
        Ok(Self(unsafe { device.alloc::<T>(len) }?))
    }

    pub fn address(&mut self) -> Address {
        let stream = self.0.stream().clone();
        self.0.device_ptr_mut(&stream).0
    }

    pub fn into_tensor(self, device: &CudaDevice, shape: impl Into<Shape>) -> Tensor {
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(self.0, device.clone()));
        Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), false)
    }
}

impl Scratch<u32> {
    pub fn zeros(device: &CudaDevice, len: usize) -> Result<Self> {
        Ok(Self(device.cuda_stream().alloc_zeros(len).w()?))
    }
}
