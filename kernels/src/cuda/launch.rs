//! Loads the kernels and launches them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaFunction, CudaModule, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{CudaDevice, Result};

use crate::args::{FfnArgs, QuantizeArgs, RouteArgs, SortArgs};
use crate::plan::Launch;

/// All kernels, for every architecture that the build was made for.
static FATBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dynamoe.fatbin"));

/// A kernel's argument.
pub(super) trait Args: Copy {}
impl Args for RouteArgs {}
impl Args for SortArgs {}
impl Args for QuantizeArgs {}
impl Args for FfnArgs {}

#[repr(transparent)]
struct ByValue<A>(A);

// SAFETY: plain data, laid out as the kernel's struct
unsafe impl<A: Args> DeviceRepr for ByValue<A> {}

#[derive(Default)]
struct Loaded {
    modules: HashMap<usize, Arc<CudaModule>>,
    functions: HashMap<(usize, String), CudaFunction>,
}

static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);

/// Modules belong to a context, of which there is one for each device.
fn function(context: &Arc<CudaContext>, launch: &Launch) -> Result<CudaFunction> {
    let ordinal = context.ordinal();
    let mut loaded = LOADED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let loaded = loaded.get_or_insert_default();
    let key = (ordinal, launch.kernel.clone());
    if let Some(function) = loaded.functions.get(&key) {
        return Ok(function.clone());
    }
    let module = match loaded.modules.get(&ordinal) {
        Some(module) => Arc::clone(module),
        None => {
            let module = context.load_module(Ptx::from_binary(FATBIN.to_vec())).w()?;
            loaded.modules.insert(ordinal, Arc::clone(&module));
            module
        }
    };
    let function = module.load_function(&launch.kernel).w()?;
    if launch.shared_bytes > 48 * 1024 {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, launch.shared_bytes as i32).w()?;
    }
    loaded.functions.insert(key, function.clone());
    Ok(function)
}

/// Launches a kernel. Does nothing if the grid has no blocks.
///
/// # Safety
/// Until the kernel has run, the addresses in `args` must be valid for its reads and writes.
pub(super) unsafe fn launch<A: Args>(device: &CudaDevice, launch: &Launch, args: &A) -> Result<()> {
    let [x, y] = launch.grid;
    if x == 0 || y == 0 {
        return Ok(());
    }
    if y > 65_535 {
        candle_core::bail!("{}: expected at most 65535 blocks in y, found {y}", launch.kernel);
    }
    let stream = device.cuda_stream();
    let function = function(stream.context(), launch)?;
    let config = LaunchConfig {
        grid_dim: (x, y, 1),
        block_dim: (launch.threads, 1, 1),
        shared_mem_bytes: launch.shared_bytes,
    };
    let args = ByValue(*args);
    let mut builder = stream.launch_builder(&function);
    builder.arg(&args);
    // SAFETY: the argument is the kernel's struct, and the caller promises valid addresses
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}
