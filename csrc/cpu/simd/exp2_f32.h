// 2^f for f in [-1/2, 1/2], float32: a minimax polynomial of degree 5, relative error 7.5e-8.
static inline vreal exp2_fraction(vreal f) {
    vreal y = v_set1(0.001327647217f);
    y = v_fma(y, f, v_set1(0.009675541331f));
    y = v_fma(y, f, v_set1(0.05550713273f));
    y = v_fma(y, f, v_set1(0.2402211972f));
    y = v_fma(y, f, v_set1(0.6931469671f));
    return v_fma(y, f, v_set1(1.000000072f));
}
