// Functions that the CPU's and the GPU's compiler both take.
#ifndef FA_HOST_DEVICE_H
#define FA_HOST_DEVICE_H

#ifdef __CUDACC__
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FA_HOST_DEVICE inline
#endif

#endif
