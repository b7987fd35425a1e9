// All kernels, by the names under which they are launched. nvcc compiles this file for GPUs, kernels/sim for a CPU.
//
// Each .cuh names the function of src/plan.rs that launches its kernels, what they are compared with (src/reference.rs),
// and the test in tests/ that does it.
#include "decode.cuh"
#include "decode_mma.cuh"
#include "few.cuh"
#include "prefill.cuh"
#include "prefill_quantized.cuh"
#include "prefill_wgmma.cuh"
#include "quantized.cuh"
#include "router.cuh"
#include "sort.cuh"

#define HALVES(KERNEL)      \
    KERNEL(f16, __half)     \
    KERNEL(bf16, __nv_bfloat16)
#define FLOATS(KERNEL) KERNEL(f32, float) HALVES(KERNEL)

#define ROUTE(type, T) DYNAMOE_KERNEL(route_##type, RouteArgs, ROUTE_THREADS, route<T>)
FLOATS(ROUTE)
DYNAMOE_KERNEL(decide, RouteArgs, ROUTE_THREADS, decide_tokens)
DYNAMOE_KERNEL(sort, SortArgs, SORT_THREADS, sort_tokens)

// KERNEL(…, N) for groups of up to N tokens
#define GROUPS_TO_4(KERNEL, ...) \
    KERNEL(__VA_ARGS__, 1)       \
    KERNEL(__VA_ARGS__, 2)       \
    KERNEL(__VA_ARGS__, 4)
#define GROUPS(KERNEL, ...) GROUPS_TO_4(KERNEL, __VA_ARGS__) KERNEL(__VA_ARGS__, 8)

#define DECODE_GROUP(type, T, N)                                                                 \
    DYNAMOE_KERNEL(decode_gate_up_##type##_##N, FfnArgs, DECODE_THREADS, (decode_gate_up<T, N>)) \
    DYNAMOE_KERNEL(decode_down_##type##_##N, FfnArgs, DECODE_THREADS, (decode_down<T, N>))
#define DECODE_MMA(type, T)                                                                \
    DYNAMOE_KERNEL(decode_gate_up_##type##_8, FfnArgs, MMA_THREADS, decode_mma_gate_up<T>) \
    DYNAMOE_KERNEL(decode_down_##type##_8, FfnArgs, MMA_THREADS, decode_mma_down<T>)
#define DECODE(type, T) GROUPS_TO_4(DECODE_GROUP, type, T)
FLOATS(DECODE)
DECODE_GROUP(f32, float, 8)
HALVES(DECODE_MMA)

#define QUANTIZE(type, T) DYNAMOE_KERNEL(quantize_##type, QuantizeArgs, QUANTIZE_THREADS, quantize<T>)
FLOATS(QUANTIZE)

#define QUANTIZED_GATE_UP(format, Q, N) \
    DYNAMOE_KERNEL(decode_gate_up_##format##_##N, FfnArgs, DECODE_THREADS, (quantized_gate_up<Q, N>))
#define QUANTIZED_DOWN(format, Q, type, T, N) \
    DYNAMOE_KERNEL(decode_down_##format##_##type##_##N, FfnArgs, DECODE_THREADS, (quantized_down<Q, T, N>))
#define QUANTIZED_DOWN_Q4K(type, T) GROUPS(QUANTIZED_DOWN, q4k, Q4K, type, T)
#define QUANTIZED_DOWN_Q8_0(type, T) GROUPS(QUANTIZED_DOWN, q8_0, Q8_0, type, T)
GROUPS(QUANTIZED_GATE_UP, q4k, Q4K)
GROUPS(QUANTIZED_GATE_UP, q8_0, Q8_0)
FLOATS(QUANTIZED_DOWN_Q4K)
FLOATS(QUANTIZED_DOWN_Q8_0)

#define PREFILL(type, T)                                                                    \
    DYNAMOE_KERNEL(prefill_gate_up_##type, FfnArgs, PREFILL_THREADS, prefill_gate_up<T>) \
    DYNAMOE_KERNEL(prefill_down_##type, FfnArgs, PREFILL_THREADS, prefill_down<T>)
HALVES(PREFILL)

// one block fills a multiprocessor's shared memory
#define PREFILL_WGMMA_N(type, T, N)                                                                                \
    DYNAMOE_KERNEL_OF(prefill_gate_up_##type##_wgmma##N, FfnArgs, PREFILL_THREADS, 1, (wgmma_gate_up<T, N>)) \
    DYNAMOE_KERNEL_OF(prefill_down_##type##_wgmma##N, FfnArgs, PREFILL_THREADS, 1, (wgmma_down<T, N>))
#define PREFILL_WGMMA(type, T) PREFILL_WGMMA_N(type, T, 128) PREFILL_WGMMA_N(type, T, 256)
#if defined(DYNAMOE_SIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
HALVES(PREFILL_WGMMA)
#endif

#define FEW_N(type, T, N)                                                                           \
    DYNAMOE_KERNEL_OF(few_gate_up_##type##_##N, FfnArgs, FEW_THREADS, 2, (few_gate_up<T, N>)) \
    DYNAMOE_KERNEL_OF(few_down_##type##_##N, FfnArgs, FEW_THREADS, 2, (few_down<T, N>))
#define FEW(type, T)                                                \
    FEW_N(type, T, 16) FEW_N(type, T, 32) FEW_N(type, T, 64) \
    DYNAMOE_KERNEL(few_sum_##type, FfnArgs, FEW_SUM_THREADS, few_sum<T>)
HALVES(FEW)

#define PREFILL_QUANTIZED_OF(format, Q, type, T)                                                                      \
    DYNAMOE_KERNEL(prefill_gate_up_##format##_##type, FfnArgs, PREFILL_THREADS, (prefill_quantized_gate_up<Q, T>)) \
    DYNAMOE_KERNEL(prefill_down_##format##_##type, FfnArgs, PREFILL_THREADS, (prefill_quantized_down<Q, T>))
#define PREFILL_QUANTIZED(type, T) PREFILL_QUANTIZED_OF(q4k, Q4K, type, T) PREFILL_QUANTIZED_OF(q8_0, Q8_0, type, T)
HALVES(PREFILL_QUANTIZED)
