//! Matrix products whose factors are rounded to bf16, with sums in f32: twice the rate of f32 on processors with
//! AVX-512's bf16 dot products.
//!
//! `c (m, n) = a (m, k) b (k, n)`. A dot product takes pairs of neighbours along `k`, so both factors are packed into
//! pairs: `b` as a whole, since many blocks of rows share it, and of `a` [`DEPTH`] of `k` at once. What is beyond an edge
//! is packed as zeros.

use std::arch::x86_64::*;
use std::cell::RefCell;

use faer::{Accum, MatRef};
use rayon::prelude::*;

/// Columns of a panel of `b`: it stays in the first cache while all rows pass by.
const COLUMNS: usize = VECTORS * LANES;
/// Registers that hold a row's sums.
const VECTORS: usize = 4;
/// Sums in a register.
const LANES: usize = 16;
/// Rows whose sums are in registers at once.
const ROWS: usize = 6;
/// How much of `k` is packed at once.
const DEPTH: usize = 256;
/// As pairs.
const PAIRS: usize = DEPTH / 2;

thread_local! {
    /// Packed rows of `a`, `(m, PAIRS)`.
    static ROWS_OF_A: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) };
}

/// Whether this processor has the instructions.
pub(super) fn supported() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// A right factor `b (k, n)`: panels of [`COLUMNS`] columns, each `(k / 2, COLUMNS)` pairs.
pub(super) struct Packed {
    pairs: Vec<u32>,
    k: usize,
    n: usize,
}

impl Packed {
    /// Packs `b`, whose rows or columns are neighbours; panels in parallel.
    ///
    /// # Panics
    /// A processor without the instructions.
    pub(super) fn new(b: MatRef<'_, f32>) -> Self {
        assert!(supported());
        let (k, n) = b.shape();
        let mut pairs = vec![0; n.div_ceil(COLUMNS) * k.div_ceil(2) * COLUMNS];
        let panels = pairs.par_chunks_mut((k.div_ceil(2) * COLUMNS).max(1)).enumerate();
        panels.for_each(|(panel, to)| {
            let first = panel * COLUMNS;
            // SAFETY: the processor has the instructions
            unsafe { pack_panel(b.subcols(first, COLUMNS.min(n - first)), to) };
        });
        Self { pairs, k, n }
    }
}

/// `c = a b` or `c += a b`, `c` row-major, on this thread, with the first rows of `b`, as many as `a` has columns, and its
/// first `n` columns.
///
/// # Panics
/// Shapes that do not fit.
pub(super) fn multiply(c: &mut [f32], accum: Accum, a: MatRef<'_, f32>, b: &Packed, n: usize) {
    let (m, k) = a.shape();
    assert!(k <= b.k && n <= b.n && c.len() == m * n);
    if let Accum::Replace = accum {
        c.fill(0.0);
    }
    ROWS_OF_A.with_borrow_mut(|rows| {
        // the kernel reads whole tiles of rows, of which it leaves out those that are none
        rows.resize(m.next_multiple_of(ROWS) * PAIRS, 0);
        for depth in (0..k).step_by(DEPTH) {
            let len = DEPTH.min(k - depth);
            // SAFETY: the processor has the instructions: there is a `Packed`
            unsafe { pack_rows(a.subcols(depth, len), rows) };
            for (panel, column) in
                b.pairs.chunks_exact(b.k.div_ceil(2) * COLUMNS).zip((0..n).step_by(COLUMNS))
            {
                let panel = &panel[depth / 2 * COLUMNS..][..len.div_ceil(2) * COLUMNS];
                let columns = COLUMNS.min(n - column);
                for row in (0..m).step_by(ROWS) {
                    let rows = &rows[row * PAIRS..][..ROWS * PAIRS];
                    let to =
                        Tile { c: &mut c[row * n + column..], stride: n, rows: ROWS.min(m - row), columns };
                    // SAFETY: likewise; `c` holds these numbers
                    unsafe { add_product(rows, panel, to) };
                }
            }
        }
    });
}

/// Part of `c`: rows of numbers, `stride` apart.
struct Tile<'a> {
    c: &'a mut [f32],
    stride: usize,
    rows: usize,
    columns: usize,
}

/// Two numbers as a pair of bf16, the first in the lower half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vl")]
fn pairs(first: __m512, second: __m512) -> __m512i {
    let wide = |half: __m512| {
        let half = _mm512_cvtneps_pbh(half);
        // SAFETY: vectors of one size, all of whose bits are numbers
        _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(half) })
    };
    _mm512_or_si512(wide(first), _mm512_slli_epi32::<16>(wide(second)))
}

/// 32 neighbours, of which `len` are there, as 16 pairs.
///
/// # Safety
/// `len` numbers can be read.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pairs_of_row(from: *const f32, len: usize) -> __m512i {
    // SAFETY: masks leave out what is beyond `len`; vectors of one size, all of whose bits are numbers
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask(len), from);
        let high = _mm512_maskz_loadu_ps(mask(len.saturating_sub(LANES)), from.wrapping_add(LANES));
        std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// The first `len` lanes.
fn mask(len: usize) -> __mmask16 {
    (1u32 << len.min(LANES)).wrapping_sub(1) as __mmask16
}

/// Packs `a (m, k)`, each row as pairs along `k`, [`PAIRS`] apart.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vl")]
fn pack_rows(a: MatRef<'_, f32>, to: &mut [u32]) {
    let (m, k) = a.shape();
    if a.col_stride() == 1 {
        for (row, to) in to.chunks_exact_mut(PAIRS).take(m).enumerate() {
            for (at, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate().take(k.div_ceil(2 * LANES)) {
                let first = at * 2 * LANES;
                // SAFETY: the row has `k - first` numbers from there on
                unsafe {
                    let from = a.as_ptr().offset(row as isize * a.row_stride()).add(first);
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), pairs_of_row(from, k - first));
                }
            }
        }
        return;
    }
    // columns of neighbours: pairs of two columns, 16 rows at once
    let (across, down) = (a.col_stride(), a.row_stride());
    assert_eq!(down, 1, "expected rows or columns of neighbours");
    let mut of_rows = [0u32; LANES];
    for pair in 0..k.div_ceil(2) {
        for row in (0..m).step_by(LANES) {
            let here = LANES.min(m - row);
            // SAFETY: masks leave out rows beyond the last, and the second column where there is none
            unsafe {
                let from = a.as_ptr().add(row).offset(2 * pair as isize * across);
                let second = if 2 * pair + 1 < k { mask(here) } else { 0 };
                let second = _mm512_maskz_loadu_ps(second, from.wrapping_offset(across));
                let both = pairs(_mm512_maskz_loadu_ps(mask(here), from), second);
                _mm512_storeu_si512(of_rows.as_mut_ptr().cast(), both);
            }
            for (row, &both) in (row..row + here).zip(&of_rows) {
                to[row * PAIRS + pair] = both;
            }
        }
    }
}

/// Packs `b (k, n)`, at most `COLUMNS` columns, as `(k / 2, COLUMNS)`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,avx512vl")]
fn pack_panel(b: MatRef<'_, f32>, to: &mut [u32]) {
    let (k, n) = b.shape();
    if b.col_stride() == 1 {
        for (pair, to) in to.chunks_exact_mut(COLUMNS).take(k.div_ceil(2)).enumerate() {
            for (at, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                let here = mask(n.saturating_sub(at * LANES));
                // SAFETY: masks leave out columns beyond the last, and the second row where there is none
                unsafe {
                    let from = b.as_ptr().offset(2 * pair as isize * b.row_stride()).wrapping_add(at * LANES);
                    let second = if 2 * pair + 1 < k { here } else { 0 };
                    let second = _mm512_maskz_loadu_ps(second, from.wrapping_offset(b.row_stride()));
                    let both = pairs(_mm512_maskz_loadu_ps(here, from), second);
                    _mm512_storeu_si512(to.as_mut_ptr().cast(), both);
                }
            }
        }
        return;
    }
    // a transposed matrix: 16 columns by 16 pairs are turned in registers
    assert_eq!(b.row_stride(), 1, "expected rows or columns of neighbours");
    for column in (0..COLUMNS).step_by(LANES) {
        for first in (0..k).step_by(2 * LANES) {
            let mut square = [_mm512_setzero_si512(); LANES];
            for (column, square) in (column..n).zip(&mut square) {
                // SAFETY: the column has `k - first` numbers from there on
                unsafe {
                    let from = b.as_ptr().offset(column as isize * b.col_stride()).add(first);
                    *square = pairs_of_row(from, k - first);
                }
            }
            transpose(&mut square);
            let pairs = (k - first).div_ceil(2).min(LANES);
            for (pair, square) in square.iter().enumerate().take(pairs) {
                let to = &mut to[(first / 2 + pair) * COLUMNS + column..][..LANES];
                // SAFETY: `to` holds 16 pairs
                unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *square) };
            }
        }
    }
}

/// Transposes 16 rows of 16 numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(rows: &mut [__m512i; LANES]) {
    // within each quarter of a register: 4 by 4 numbers of neighbouring rows
    let mut turned = [_mm512_setzero_si512(); LANES];
    for (rows, turned) in rows.as_chunks::<4>().0.iter().zip(turned.as_chunks_mut::<4>().0) {
        let [a, b, c, d] = *rows;
        let (low, high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (low2, high2) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        *turned = [
            _mm512_unpacklo_epi64(low, low2),
            _mm512_unpackhi_epi64(low, low2),
            _mm512_unpacklo_epi64(high, high2),
            _mm512_unpackhi_epi64(high, high2),
        ];
    }
    // quarters: 4 by 4 of those squares
    for i in 0..4 {
        let [a, b, c, d] = [turned[i], turned[4 + i], turned[8 + i], turned[12 + i]];
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        rows[i] = _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even);
        rows[8 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even);
        rows[4 + i] = _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd);
        rows[12 + i] = _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd);
    }
}

/// Adds the product of [`ROWS`] packed rows and a panel.
///
/// # Safety
/// `to.c` holds the tile's numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn add_product(rows: &[u32], panel: &[u32], to: Tile<'_>) {
    let pairs = panel.len() / COLUMNS;
    assert!(rows.len() == ROWS * PAIRS && pairs <= PAIRS);
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
    // SAFETY: every row and the panel have `pairs` pairs; masks leave out columns beyond the last; the caller's word
    unsafe {
        for pair in 0..pairs {
            let b: [__m512bh; VECTORS] = std::array::from_fn(|v| {
                let at = panel.as_ptr().add(pair * COLUMNS + v * LANES);
                std::mem::transmute(_mm512_loadu_si512(at.cast()))
            });
            for (row, sums) in sums.iter_mut().enumerate() {
                let a = _mm512_set1_epi32(*rows.as_ptr().add(row * PAIRS + pair) as i32);
                let a = std::mem::transmute::<__m512i, __m512bh>(a);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = _mm512_dpbf16_ps(*sum, a, b);
                }
            }
        }
        for (row, sums) in sums.iter().enumerate().take(to.rows) {
            for (v, sum) in sums.iter().enumerate() {
                let here = mask(to.columns.saturating_sub(v * LANES));
                let c = to.c.as_mut_ptr().wrapping_add(row * to.stride + v * LANES);
                _mm512_mask_storeu_ps(c, here, _mm512_add_ps(*sum, _mm512_maskz_loadu_ps(here, c)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use faer::Mat;
    use half::bf16;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    /// Random numbers, as `(rows, columns)` by rows or by columns.
    fn random(rng: &mut StdRng, rows: usize, columns: usize, by_rows: bool) -> Mat<f32> {
        let mut values = Mat::from_fn(rows, columns, |_, _| rng.random_range(-2.0..2.0));
        if by_rows {
            // faer's matrices stand by columns
            values = values.transpose().to_owned();
        }
        values
    }

    /// Such numbers as they were meant.
    fn view(x: &Mat<f32>, by_rows: bool) -> MatRef<'_, f32> {
        if by_rows { x.as_ref().transpose() } else { x.as_ref() }
    }

    #[test]
    fn products_equal_those_of_rounded_factors() {
        if !supported() {
            println!("not run: this processor has no bf16 dot products");
            return;
        }
        let seed = rand::random();
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let sizes = [1, 2, 5, 6, 7, 15, 16, 17, 31, 33, 64, 65, 128, 129, 255, 257, 300];
        let size = |rng: &mut StdRng| sizes[rng.random_range(0..sizes.len())];
        for case in 0..300 {
            let (m, k, n) = (size(&mut rng), size(&mut rng), size(&mut rng));
            let [a_by_rows, b_by_rows, add] = rng.random();
            let a = random(&mut rng, m, k, a_by_rows);
            let b = random(&mut rng, k, n, b_by_rows);
            let (a, b) = (view(&a, a_by_rows), view(&b, b_by_rows));
            // parts of larger matrices: of `b` the first rows and columns, as an expert's neurons are
            let (packed, a) = (Packed::new(b), a.subcols(0, k - k / 3));
            let n = n - n / 4;
            let before: Vec<f32> = (0..m * n).map(|_| rng.random_range(-2.0..2.0)).collect();
            let mut c = if add { before.clone() } else { vec![f32::NAN; m * n] };
            multiply(&mut c, if add { Accum::Add } else { Accum::Replace }, a, &packed, n);
            let round = |x: f32| f64::from(bf16::from_f32(x));
            for (at, found) in c.iter().enumerate() {
                let terms = (0..a.ncols()).map(|i| round(a[(at / n, i)]) * round(b[(i, at % n)]));
                let expected = terms.sum::<f64>() + if add { f64::from(before[at]) } else { 0.0 };
                let bound = 4.0 * f64::from(f32::EPSILON) * (a.ncols() as f64 + 1.0) * 4.0;
                assert!(
                    (f64::from(*found) - expected).abs() <= bound,
                    "case {case}, ({m}, {k}, {n}), place {at}: expected {expected}, found {found}"
                );
            }
        }
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        if !supported() {
            return;
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let (a, b) = (vec![1.0, bad], vec![1.0; 2 * 40]);
            let mut c = vec![0.0; 40];
            let b = MatRef::from_row_major_slice(&b, 2, 40);
            multiply(&mut c, Accum::Replace, MatRef::from_row_major_slice(&a, 1, 2), &Packed::new(b), 40);
            assert!(c.iter().all(|c| !c.is_finite()), "{bad}: {c:?}");
        }
    }
}
