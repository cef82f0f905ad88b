# Table of `make ptxas`, from the demangled logs of `ptxas -v`. Exit status 1: a hot kernel spills, or ptxas made its
# wgmma wait for one another. Cold is what nobody waits for: the baseline, the padding, float64; and, known to spill 92
# bytes, one tile on sm_80: d_k and d_v of rows wider than 128. The kernels on tensor cores hold their sums in all 255
# registers, and some addresses and scalars of a turn pass over the stack: up to 160 bytes, known, or 240 in those of any
# features (`, 31u>`). Decoding on CUDA cores has 16 warps of three trades: up to 64 bytes pass over the stack.
BEGIN { print "registers  static shared  stack  spills  arch    kernel (bytes)" }

# "void name<arguments>(parameters)" -> "name<arguments>"
function short_name(text, i, depth, c) {
    gsub(/\(anonymous namespace\)::/, "", text)
    sub(/^void /, "", text)
    for (i = 1; i <= length(text); ++i) {
        c = substr(text, i, 1)
        depth += (c == "<") - (c == ">")
        if (c == "(" && depth == 0) return substr(text, 1, i - 1)
    }
    return text
}
function number_before(words) { return match($0, "[0-9]+ " words) ? substr($0, RSTART, RLENGTH) + 0 : 0 }

/Compiling entry function/ {
    split($0, quoted, "'")
    kernel = short_name(quoted[2])
    arch = quoted[4]
    stack = spills = 0
}
/bytes stack frame/ { # of the kernel, and of each function that it calls
    stack += number_before("bytes stack frame")
    spills += number_before("bytes spill stores") + number_before("bytes spill loads")
}
/Used [0-9]+ registers/ {
    hot = FILENAME !~ /\/(naive|naive_backward|padding)\.cu\.log$/ && kernel !~ /double/ &&
        !(arch == "sm_80" && kernel ~ /^fused_backward_kv<KeyTile<[^>]*, true>/)
    allowed = kernel ~ /^decode<Fused/ ? 64 : kernel !~ /^tensor_core/ ? 0 : kernel ~ /, 31u>$/ ? 240 : 160
    printf "%9d  %13d  %5d  %6d  %-6s  %s%s\n", number_before("registers"), number_before("bytes smem"), stack, spills,
        arch, kernel, (spills > allowed && hot) ? "   <- spills" : ""
    failed += (spills > allowed && hot)
}
/Potential Performance Loss/ {
    print
    ++failed
}
END { exit failed > 0 }
