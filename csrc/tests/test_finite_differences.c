// The oracle's own gradients: (loss(x + h r) - loss(x - h r)) / 2h = <d_x, r> for a random direction r, in float64, with
// loss = <o, d_o> + <lse, d_lse>.
#include <math.h>

#include "problem.h"

static const attention_case kCases[] = {
    {"every feature", 2, 4, 2, 9, 12, 8, 5, .softcap = 2, .bias = "hqk", .alibi = 1, .sinks = true, .dropout_p = 0.2,
     .d_lse = true},
    {"padded, slopes for each sequence", 3, 2, 1, 11, 9, 4, .causal = true, .alibi = 2, .bias = "bk",
     .lengths = LENGTHS_PADDED, .d_lse = true},
    {"packed, window", 3, 2, 2, 11, 13, 4, .window = true, .window_left = 3, .window_right = 1, .sinks = true,
     .lengths = LENGTHS_PACKED},
};

static double loss(const problem *p) {
    double sum = 0;
    fa_forward_args args = p->args.forward;
    fa_forward_workspace_bytes(&args, &args.workspace_bytes);
    args.workspace = guarded(args.workspace_bytes, FA_WORKSPACE_ALIGNMENT, FLUSH_END);
    expect(fa_forward(&args) == FA_OK, "%s", fa_error_text());
    for (int64_t i = 0; i < view_size(&p->views[VIEW_O]); ++i)
        sum += view_at(&p->views[VIEW_O], i) * view_at(&p->views[VIEW_D_O], i);
    if (p->views[VIEW_D_LSE].data)
        for (int64_t i = 0; i < view_size(&p->views[VIEW_LSE]); ++i)
            if (isfinite(view_at(&p->views[VIEW_LSE], i)))
                sum += view_at(&p->views[VIEW_LSE], i) * view_at(&p->views[VIEW_D_LSE], i);
    return sum;
}

// Every input here is contiguous but for the axes that broadcast, so memory order is a direction as good as any.
static double direction(int64_t i) { return cos(1.7 * (double)i); }
static void move(const view *v, double step) {
    for (int64_t i = 0; i < v->elements; ++i) ((double *)v->data)[i] += step * direction(i);
}

static void check_gradient(const attention_case *c, view_id input, view_id gradient) {
    test_begin("%s by finite differences, %s", kViewNames[gradient], c->name);
    problem p = problem_make(c, FA_FLOAT64, FA_REFERENCE, true, FLUSH_END);
    problem_run(&p, (fa_workers){0}, FLUSH_END);
    const view *x = &p.views[input], *d_x = &p.views[gradient];
    const double h = 1e-5;
    double predicted = 0;
    for (int64_t i = 0; i < d_x->elements; ++i) predicted += ((double *)d_x->data)[i] * direction(i);
    guarded_protect(x->data, true);
    guarded_protect(p.views[VIEW_O].data, true);
    guarded_protect(p.views[VIEW_LSE].data, true);
    move(x, h);
    const double above = loss(&p);
    move(x, -2 * h);
    const double measured = (above - loss(&p)) / (2 * h);
    expect(fabs(measured - predicted) <= 1e-7 * (1 + fabs(predicted)), "measured %.12g, %s says %.12g", measured,
           kViewNames[gradient], predicted);
    guarded_release_all();
}

void test_finite_differences(void) {
    static const view_id kPairs[][2] = {{VIEW_Q, VIEW_D_Q},           {VIEW_K, VIEW_D_K},
                                        {VIEW_V, VIEW_D_V},           {VIEW_BIAS, VIEW_D_BIAS},
                                        {VIEW_SLOPES, VIEW_D_SLOPES}, {VIEW_SINKS, VIEW_D_SINKS}};
    for (size_t i = 0; i < sizeof kCases / sizeof kCases[0]; ++i)
        for (size_t j = 0; j < sizeof kPairs / sizeof kPairs[0]; ++j) {
            const bool absent = (kPairs[j][0] == VIEW_BIAS && !kCases[i].bias) ||
                                (kPairs[j][0] == VIEW_SLOPES && !kCases[i].alibi) ||
                                (kPairs[j][0] == VIEW_SINKS && !kCases[i].sinks);
            if (!absent) check_gradient(&kCases[i], kPairs[j][0], kPairs[j][1]);
        }
}
