// Copies from global to shared memory that pass no register and that no thread waits for (PTX ISA, "cp.async").
#ifndef FA_PTX_CP_ASYNC_CUH
#define FA_PTX_CP_ASYNC_CUH

#include "cuda/ptx/shared.cuh"

// On sm_90a ptxas puts three empty instructions between a load of shared memory and a copy to it, none between copies: they
// are better issued in groups.

// 16 bytes, both addresses aligned to them; zeros, and nothing is read, unless `valid`.
__device__ __forceinline__ void cp_async_16(void *shared, const void *global, bool valid) {
    asm volatile("{\n\t.reg .pred ignored;\n\tsetp.eq.u32 ignored, %2, 0;\n\t"
                 "cp.async.cg.shared.global [%0], [%1], 16, ignored;\n\t}" ::"r"(shared_address(shared)),
                 "l"(global), "r"(static_cast<uint32_t>(valid))
                 : "memory");
}

// How the L2 cache treats what is read; once: other data stays there for longer (PTX ISA, "createpolicy").
__device__ __forceinline__ uint64_t l2_policy(bool once) {
    uint64_t policy;
    if (once)
        asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    else
        asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void *global, bool valid, uint64_t policy) {
    asm volatile("{\n\t.reg .pred ignored;\n\tsetp.eq.u32 ignored, %2, 0;\n\t"
                 "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, ignored, %3;\n\t}" ::"r"(shared),
                 "l"(global), "r"(static_cast<uint32_t>(valid)), "l"(policy)
                 : "memory");
}

// 16 bytes, both addresses aligned to them: the first `bytes`, 0 to 16, are read, the others become zeros.
__device__ __forceinline__ void cp_async_16_part(uint32_t shared, const void *global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}

// 4 bytes; zeros, and nothing is read, unless `valid`.
__device__ __forceinline__ void cp_async_4(void *shared, const void *global, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

// Ends a group: this thread's copies since the last one.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all of this thread's groups but the newest kPending have arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif
