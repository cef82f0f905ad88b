// Barriers in shared memory that count arrivals, and phases of them: a phase ends with its last arrival, phase 0 is the first
// (PTX ISA, "mbarrier").
#ifndef FA_PTX_MBARRIER_CUH
#define FA_PTX_MBARRIER_CUH

#include "cuda/ptx/shared.cuh"

struct Mbarrier {
    uint64_t state;

    // By one thread, before a __syncthreads.
    __device__ __forceinline__ void init(int arrivals) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
    }
    // What this thread did before can be seen by who waits.
    __device__ __forceinline__ void arrive() {
        asm volatile(
            "{\n\t.reg .b64 ignored;\n\tmbarrier.arrive.shared.b64 ignored, [%0];\n\t}" ::"r"(shared_address(this))
            : "memory");
    }
    // Arrives when all copies that this thread has begun with cp.async have.
    __device__ __forceinline__ void arrive_after_copies() {
        asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(this)) : "memory");
    }
    // Returns when the phase of this parity has ended; the one before the first has parity 1.
    __device__ __forceinline__ void wait(uint32_t parity) {
        asm volatile("{\n\t.reg .pred done;\n\t"
                     "again_%=:\n\t"
#if __CUDA_ARCH__ >= 900
                     "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n\t"
#else
                     "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n\t"
#endif
                     "@!done bra again_%=;\n\t}" ::"r"(shared_address(this)),
                     "r"(parity)
                     : "memory");
    }
};

#endif
