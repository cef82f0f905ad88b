// 2^f for f in [-1/2, 1/2], float64: the Taylor series ln(2)^k / k! to degree 13, whose next term is below 5e-18.
static inline vreal exp2_fraction(vreal f) {
    static const double kCoefficients[14] = {1.3691488853904124e-12, 2.5678435993488202e-11,
                                             4.445538271870812e-10,  7.054911620801123e-09,
                                             1.0178086009239699e-07, 1.321548679014431e-06,
                                             1.5252733804059841e-05, 0.0001540353039338161,
                                             0.0013333558146428443,  0.009618129107628477,
                                             0.05550410866482158,    0.2402265069591007,
                                             0.6931471805599453,     1.0};
    vreal y = v_set1(kCoefficients[0]);
    for (int k = 1; k < 14; ++k) y = v_fma(y, f, v_set1(kCoefficients[k]));
    return y;
}
