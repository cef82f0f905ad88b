// What the micro-kernel multiplies: reals, one step of a contraction each.
typedef real operand;
typedef vreal voperand;
enum { kDepth = 1 };

static inline voperand v_load_operand(const operand *p) { return v_load(p); }
static inline voperand v_set1_operand(operand x) { return v_set1(x); }
static inline vreal v_dot(voperand a, voperand b, vreal c) { return v_fma(a, b, c); }

// kStep neighbours of a row, as operands along it.
static inline void v_store_operand(operand *p, const real *x) { v_store(p, v_load(x)); }
// 2 * kLanes neighbours of a row, as operands along it.
static inline void v_store_along(operand *p, vreal x0, vreal x1) {
    v_store(p, x0);
    v_store(p + kLanes, x1);
}
