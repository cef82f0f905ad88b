// Kernels that overlap with the one before them in the stream, on sm_90 (PTX ISA, "griddepcontrol"). Older devices run them
// one after the other, and there is nothing to say.
#ifndef FA_PTX_DEPENDENT_CUH
#define FA_PTX_DEPENDENT_CUH

// When all blocks have come here, the next kernel's may start where there is room.
__device__ __forceinline__ void let_dependents_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns when the kernels before are done and what they wrote can be read.
__device__ __forceinline__ void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
