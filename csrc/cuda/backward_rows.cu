// Once a row: delta = rowsum(dO o O) - d_lse, and lse, +inf where the row has neither key nor sink.
//
// Memory is all there is to wait for. A row is shared by `lanes` neighbours, each of which reads 16 bytes of it at a
// time, and each thread has kAtOnce rows under way:
//
//   load lse, d_lse | load O, dO of kAtOnce rows | products | add up over the lanes | store, a row a lane
#include "cuda/backward.cuh"

enum { kAtOnce = 4 };

struct RowGrid {
    int lanes, m_blocks; // lanes: a power of two
};

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    backward_rows(const __grid_constant__ fa_backward_args args, const __grid_constant__ BackwardPlan plan,
                  const __grid_constant__ RowGrid grid) {
    using Real = std::conditional_t<sizeof(Element) == 8, double, float>;
    const fa_forward_args &forward = args.forward;
#pragma unroll 1
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < plan.semaphore_count;
         i += static_cast<int64_t>(gridDim.x) * kThreads)
        plan.semaphores[i] = 0;

    // Rows of a warp: 32 / lanes at a time, which it reads as one piece of memory where rows lie side by side.
    const int lanes = grid.lanes, side_by_side = 32 / lanes, warp = threadIdx.x / 32, lane = threadIdx.x % lanes;
    const int block = static_cast<int>(blockIdx.x), heads_q = static_cast<int>(forward.heads_q);
    const int bh = block / grid.m_blocks, b = bh / heads_q, h = bh % heads_q;
    const fa_sequence seq = fa_sequence_at(&forward, b);
    const int64_t warp_row0 = static_cast<int64_t>(block % grid.m_blocks * kWarps + warp) * (side_by_side * kAtOnce);
    if (warp_row0 >= seq.len_q) return;
    const auto row_at = [&](int n) { return warp_row0 + threadIdx.x % 32 / lanes + n * side_by_side; };
    const Rows<Real> o(forward.o, kDtype<Element>, seq.batch_index, h, seq.row_q, forward.head_dim_v);
    const Rows<Real> d_o(args.d_o, kDtype<Element>, seq.batch_index, h, seq.row_q, forward.head_dim_v);

    // Of the row that this lane will store.
    const int64_t row = row_at(lane);
    const bool stores = lane < kAtOnce && row < seq.len_q;
    Real lse = 0, d_lse = 0;
    if (stores) {
        const int64_t of_row = seq.row_q + row;
        lse = load<Real>(forward.lse.data, fa_lse_dtype(&forward),
                         fa_row_offset(&forward.lse, seq.batch_index, h, of_row));
        if (args.d_lse.data)
            d_lse = load<Real>(args.d_lse.data, fa_lse_dtype(&forward),
                               fa_row_offset(&args.d_lse, seq.batch_index, h, of_row));
    }

    Real sum[kAtOnce] = {};
    // Products are added in the same order, to the same bits, however rows lie.
    const auto readable = [&](int n) { return fa_min(row_at(n), seq.len_q - 1); };
    const auto add = [&](int n, const Element *x, const Element *y, int c) {
        sum[n] = fma(load<Real>(x, kDtype<Element>, c), load<Real>(y, kDtype<Element>, c), sum[n]);
    };
    const bool vectors = o.vectors && d_o.vectors;
    for (int col = lane * kVec<Element>; col < o.width; col += lanes * kVec<Element>) {
        const Element *x[kAtOnce], *y[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
            x[n] = reinterpret_cast<const Element *>(o.at(readable(n), col));
            y[n] = reinterpret_cast<const Element *>(d_o.at(readable(n), col));
        }
        if (vectors) {
            Vec<Element> vx[kAtOnce], vy[kAtOnce];
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n) vx[n] = vec_at(x[n]), vy[n] = vec_at(y[n]);
#pragma unroll
            for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
                for (int c = 0; c < kVec<Element>; ++c) add(n, vx[n].x, vy[n].x, c);
        } else {
#pragma unroll 1
            for (int c = 0; c < kVec<Element> && col + c < o.width; ++c)
#pragma unroll
                for (int n = 0; n < kAtOnce; ++n) add(n, x[n], y[n], c);
        }
    }
    for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) sum[n] += __shfl_xor_sync(~0u, sum[n], step);

    Real mine = sum[0];
#pragma unroll
    for (int n = 1; n < kAtOnce; ++n) mine = lane == n ? sum[n] : mine;
    if (!stores) return;
    const RowValues<Real> of_row = row_values<Real>(forward, seq, plan, b, h);
    const bool sees_keys = lse != -infinity(Real()); // else d_o and d_lse may be anything
    of_row.lse[row] = sees_keys ? lse : infinity(Real());
    of_row.delta[row] = sees_keys ? mine - d_lse : Real(0);
}

template <typename Element>
static fa_status launch(const fa_backward_args *args, const BackwardPlan &plan) {
    const fa_forward_args *forward = &args->forward;
    int lanes = kAtOnce; // each lane of a row stores one of its rows at most
    while (lanes < 32 && lanes * kVec<Element> < forward->head_dim_v) lanes *= 2;
    const int64_t m_blocks = fa_ceil_div(forward->seqlen_q, kThreads / lanes * kAtOnce);
    const RowGrid grid = {lanes, static_cast<int>(m_blocks)};
    return fa_launch("backward, delta", backward_rows<Element>, m_blocks * forward->heads_q * forward->batch, kThreads,
                     0, fa_stream(forward), *args, plan, grid);
}

fa_status fa_backward_rows(const fa_backward_args *args, const BackwardPlan &plan) {
    switch (args->forward.dtype) {
    case FA_FLOAT64: return launch<double>(args, plan);
    case FA_FLOAT16: FA_CHECK(launch<__half>(args, plan)); break;
    case FA_BFLOAT16: FA_CHECK(launch<__nv_bfloat16>(args, plan)); break;
    default: FA_CHECK(launch<float>(args, plan)); break;
    }
    return fa_backward_correction(args, plan);
}

// Whether a row may see no key, as far as the host can tell (finite scores do not overflow).
static bool may_have_blind_rows(const fa_forward_args *args) {
    const bool lengths_known = !args->seqlens_q && !args->seqlens_k && !args->cu_seqlens_q;
    const bool by_position = args->causal || args->window_left >= 0 || args->window_right >= 0;
    const bool each_sees_itself = args->seqlen_q <= args->seqlen_k; // a window reaches the row's own position
    return args->bias.data || args->alibi_slopes.data || !lengths_known || args->seqlen_k == 0 ||
           (by_position && !each_sees_itself);
}

void fa_plan_backward_rows(const fa_backward_args *args, BackwardPlan *plan, fa_arena *arena) {
    const fa_forward_args *forward = &args->forward;
    const int64_t rows =
        forward->heads_q * (forward->cu_seqlens_q ? forward->total_q : forward->batch * forward->seqlen_q);
    const size_t row_bytes = static_cast<size_t>(rows * fa_dtype_bytes(fa_lse_dtype(forward)));
    plan->lse = fa_take(arena, row_bytes);
    plan->correction = forward->dtype == FA_FLOAT64 ? nullptr : fa_take(arena, row_bytes);
    plan->delta = fa_take(arena, row_bytes);
    plan->has_blind_rows = may_have_blind_rows(forward);
}
