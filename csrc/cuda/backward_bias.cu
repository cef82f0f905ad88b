// The chunks that d_bias is summed in where it has fewer tiles than the GPU has room for blocks; their sum, in order.
#include "cuda/backward_bias.cuh"

enum { kPlanTile = 64, kEnoughBlocks = 512, kAddThreads = 256 };

__global__ void __launch_bounds__(kAddThreads)
    add_bias_chunks(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan) {
    const BiasShape shape(args, kPlanTile, kPlanTile);
    const int64_t element = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
    if (element >= shape.elements()) return;
    double sum = 0;
    for (int64_t chunk = 0; chunk < plan.bias_chunks; ++chunk)
        sum += plan.bias_sums[chunk * shape.elements() + element];
    shape.put(args.d_bias, element, sum);
}

fa_status fa_backward_add_bias_chunks(const fa_backward_args *args, const BackwardPlan &plan) {
    if (plan.bias_chunks == 1) return FA_OK;
    const int64_t elements = BiasShape(*args, kPlanTile, kPlanTile).elements();
    return fa_launch("backward, the sum of d_bias", add_bias_chunks, fa_ceil_div(elements, kAddThreads), kAddThreads, 0,
                     fa_stream(&args->forward), *args, plan);
}

void fa_plan_backward_bias(const fa_backward_args *args, BackwardPlan *plan, fa_arena *arena) {
    plan->bias_chunks = 1;
    plan->bias_sums = nullptr;
    if (!args->d_bias.data) return;
    const BiasShape shape(*args, kPlanTile, kPlanTile);
    const int64_t tiles = fa_max(shape.tiles(), 1);
    plan->bias_chunks = fa_max(fa_min(fa_ceil_div(kEnoughBlocks, tiles), shape.terms()), 1);
    if (plan->bias_chunks > 1)
        plan->bias_sums = static_cast<double *>(
            fa_take(arena, sizeof(double) * static_cast<size_t>(plan->bias_chunks * shape.elements())));
}
