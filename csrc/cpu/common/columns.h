// SPDX-License-Identifier: Apache-2.0
// Lowering: how activations become columns, the dimension that kernels keep in their lanes.
//
//   k ──►  a0 a1 a2 … (one tile of up to kPanel columns: batch rows of a linear layer, pixels of a convolution)
//          b0 b1 b2 …
//
// A *group* is what is lowered at once, a *tile* is what one pass of a kernel covers. All lowering is done per block of
// k, just before its use, so that a tile's block stays in the first-level cache. A kernel finds row k of a tile at
//   base + k * pitch      (LinearColumns, DirectColumns)   or   base + table[k]      (ConvColumns)
// with base already moved to the tile, k counted from the start of the block.
#pragma once

#include "core/params.h"
#include "cpu/common/simd.h"

namespace slim::cpu::SLIM_ISA {
namespace {

constexpr int kMaxTiles = 16;

// Columns that lie together in memory both in a tile and in the output.
struct Piece {
  int32_t lane, count;
  int64_t offset;  // of lane's element, in the output, for output row 0
};

struct Tile {
  int64_t column;  // where it starts in the group
  int32_t vectors;
  int32_t first_lane;  // lanes before it belong to the previous tile, computed twice and written once
};

// Where lowered rows of one k block are found; offsets in bytes.
template <class T>
struct Lowered {
  const char* base;
  int64_t pitch;         // bytes between rows, when table is null
  const int32_t* table;  // bytes, [k1 - k0], or null
};

// Cut `vectors` vectors into tiles of nearly equal size, none above the panel.
SLIM_INLINE int cut_tiles(int64_t vectors, int max_vectors, int lanes, Tile* tiles) {
  const int count = int(ceil_div(vectors, max_vectors));
  int64_t start = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t end = vectors * (i + 1) / count;
    tiles[i] = {start * lanes, int32_t(end - start), 0};
    start = end;
  }
  return count;
}

template <class T>
SLIM_INLINE void transpose4(Vec<T, 4>* r) {
  using V = Vec<T, 4>;
  typedef decltype(V{} < V{}) M;
  const V a = __builtin_shuffle(r[0], r[1], M{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], M{2, 6, 3, 7});
  const V c = __builtin_shuffle(r[2], r[3], M{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], M{2, 6, 3, 7});
  r[0] = __builtin_shuffle(a, c, M{0, 1, 4, 5});
  r[1] = __builtin_shuffle(a, c, M{2, 3, 6, 7});
  r[2] = __builtin_shuffle(b, d, M{0, 1, 4, 5});
  r[3] = __builtin_shuffle(b, d, M{2, 3, 6, 7});
}

template <class T, class IO>
SLIM_INLINE Vec<T, 4> load4(const IO* p) {
  if constexpr (sizeof(IO) == sizeof(T)) {
    return load<Vec<T, 4>>(p);
  } else {
    return Vec<T, 4>{to_compute(p[0]), to_compute(p[1]), to_compute(p[2]), to_compute(p[3])};
  }
}

template <class T, class IO>
SLIM_INLINE void store4(IO* p, Vec<T, 4> v) {
  if constexpr (sizeof(IO) == sizeof(T)) {
    store(p, v);
  } else {
    for (int i = 0; i < 4; ++i) from_compute(v[i], p + i);
  }
}

template <class Source, class T = typename Source::T>
SLIM_INLINE T bias_at(const void* bias, int64_t row) {
  return to_compute(static_cast<const typename Source::Io*>(bias)[row]);
}

// x [m, k] row-major, columns are rows of x: lowering transposes.
template <class IO>
struct LinearColumns {
  using Io = IO;
  using T = typename ComputeOf<IO>::type;
  static constexpr int kLanes = Simd<T>::kLanes;
  static constexpr bool kTable = false;

  const Activations& a;
  int64_t first = 0, columns = 0;
  int tile_count = 1;
  Tile tiles[1];

  explicit LinearColumns(const Activations& act) : a(act) {}

  static int64_t group_count(const Activations& a) { return ceil_div(a.m, Simd<T>::kPanel); }
  static int64_t lowered_bytes(const Activations&, int64_t k_block) {
    return k_block * Simd<T>::kPanel * int64_t(sizeof(T));
  }

  void begin(int64_t group) {
    first = group * Simd<T>::kPanel;
    columns = min_of<int64_t>(Simd<T>::kPanel, a.m - first);
    tiles[0] = {0, int32_t(ceil_div(columns, kLanes)), 0};
  }

  // Rows first … first + columns of a row-major matrix [*, width], its columns k0 … k1, as [k1 - k0, width of the tile].
  void transpose_in(const IO* matrix, int64_t width, int64_t k0, int64_t k1, T* out, int64_t pitch) const {
    const int64_t depth = k1 - k0;
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      const IO* x = matrix + (first + j) * width + k0;
      T* to = out + j;
      int64_t k = 0;
      for (; k + 4 <= depth; k += 4) {
        Vec<T, 4> r[4];
        for (int i = 0; i < 4; ++i) r[i] = load4<T>(x + i * width + k);
        transpose4<T>(r);
        for (int i = 0; i < 4; ++i) store(to + (k + i) * pitch, r[i]);
      }
      for (; k < depth; ++k)
        for (int i = 0; i < 4; ++i) to[k * pitch + i] = to_compute(x[i * width + k]);
    }
    for (; j < columns; ++j)
      for (int64_t k = 0; k < depth; ++k) out[k * pitch + j] = to_compute(matrix[(first + j) * width + k0 + k]);
    for (; j < pitch; ++j)
      for (int64_t k = 0; k < depth; ++k) out[k * pitch + j] = 0;
  }

  Lowered<T> lower(int64_t k0, int64_t k1, void* scratch, int32_t*) const {
    T* panel = static_cast<T*>(scratch);
    const int64_t pitch = int64_t(tiles[0].vectors) * kLanes;
    transpose_in(static_cast<const IO*>(a.x), a.k, k0, k1, panel, pitch);
    return {reinterpret_cast<const char*>(panel), pitch * int64_t(sizeof(T)), nullptr};
  }

  // acc [rows, kPanel] -> y[first …, row …]
  void write(int, const T* acc, int64_t row, int64_t rows) const {
    IO* y = static_cast<IO*>(a.y) + first * a.n + row;
    const T floor = 0;
    constexpr int64_t kChunk = 64;  // rows of acc that stay in the first-level cache while four rows of y are written
    for (int64_t n0 = 0; n0 < rows; n0 += kChunk) {
      const int64_t n1 = min_of(rows, n0 + kChunk);
      int64_t j = 0;
      for (; j + 4 <= columns; j += 4) {
        int64_t n = n0;
        for (; n + 4 <= n1; n += 4) {
          Vec<T, 4> r[4];
          for (int i = 0; i < 4; ++i) r[i] = load<Vec<T, 4>>(acc + (n + i) * Simd<T>::kPanel + j);
          if (a.relu)
            for (int i = 0; i < 4; ++i) r[i] = r[i] < floor ? Vec<T, 4>{} : r[i];  // NaN stays
          transpose4<T>(r);
          for (int i = 0; i < 4; ++i) store4<T>(y + (j + i) * a.n + n, r[i]);
        }
        for (; n < n1; ++n)
          for (int i = 0; i < 4; ++i) write_one(acc, n, j + i, y);
      }
      for (; j < columns; ++j)
        for (int64_t n = n0; n < n1; ++n) write_one(acc, n, j, y);
    }
  }

  // Gradient rows row … row + rows of tile as [rows, kPanel], zero where there is no column.
  void read_output(int, int64_t row, int64_t rows, T* out) const {
    transpose_in(static_cast<const IO*>(a.y), a.n, row, row + rows, out, Simd<T>::kPanel);
  }

 private:
  SLIM_INLINE void write_one(const T* acc, int64_t n, int64_t j, IO* y) const {
    const T v = acc[n * Simd<T>::kPanel + j];
    from_compute(a.relu && v < 0 ? T(0) : v, y + j * a.n + n);
  }
};

// What the two kinds of convolution share: outputs are written (and gradients read) in pieces.
template <class IO>
struct PixelColumns {
  using Io = IO;
  using T = typename ComputeOf<IO>::type;
  static constexpr int kLanes = Simd<T>::kLanes;

  const Activations& a;
  int tile_count = 0;
  Tile tiles[kMaxTiles];

  explicit PixelColumns(const Activations& act) : a(act) {}

  int64_t plane() const { return a.geometry.out_h * a.geometry.out_w; }

  void write_pieces(const Piece* pieces, int count, const T* acc, int64_t row, int64_t rows) const {
    IO* y = static_cast<IO*>(a.y) + row * plane();
    for (int64_t n = 0; n < rows; ++n, y += plane(), acc += Simd<T>::kPanel)
      for (int p = 0; p < count; ++p) {
        const T* from = acc + pieces[p].lane;
        IO* to = y + pieces[p].offset;
        const int32_t length = pieces[p].count;
        int32_t i = 0;
        if constexpr (sizeof(IO) == sizeof(T)) {
          using V = typename Simd<T>::V;
          for (; i + kLanes <= length; i += kLanes) {
            const V v = load<V>(from + i);
            store(to + i, a.relu ? (v < T(0) ? V{} : v) : v);  // NaN stays
          }
        }
        for (; i < length; ++i) from_compute(a.relu && from[i] < 0 ? T(0) : from[i], to + i);
      }
  }

  void read_pieces(const Piece* pieces, int count, int64_t row, int64_t rows, T* out) const {
    const IO* y = static_cast<const IO*>(a.y) + row * plane();
    for (int64_t n = 0; n < rows; ++n, y += plane(), out += Simd<T>::kPanel) {
      for (int i = 0; i < Simd<T>::kPanel; ++i) out[i] = 0;
      for (int p = 0; p < count; ++p)
        for (int32_t i = 0; i < pieces[p].count; ++i) out[pieces[p].lane + i] = to_compute(y[pieces[p].offset + i]);
    }
  }
};

// 1x1, stride 1, no padding, float32 or float64: an image already is [k, pixels]; nothing is copied.
template <class IO>
struct DirectColumns : PixelColumns<IO> {
  using Base = PixelColumns<IO>;
  using T = typename Base::T;
  using Base::a, Base::kLanes, Base::tile_count, Base::tiles;
  static constexpr bool kTable = false;
  static constexpr int64_t kGroupVectors = 4 * Simd<T>::kVectors;

  int64_t image = 0, start = 0;

  explicit DirectColumns(const Activations& act) : Base(act) {}

  static bool fits(const Activations& a) {
    const ConvGeometry& g = a.geometry;
    return g.kernel_h == 1 && g.kernel_w == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0 &&
           g.height * g.width >= Simd<T>::kPanel;
  }
  static int64_t groups_per_image(const Activations& a) {
    return ceil_div(ceil_div(a.geometry.out_h * a.geometry.out_w, kLanes), kGroupVectors);
  }
  static int64_t group_count(const Activations& a) { return a.geometry.batch * groups_per_image(a); }
  static int64_t lowered_bytes(const Activations&, int64_t) { return 0; }

  void begin(int64_t group) {
    const int64_t per_image = groups_per_image(a), vectors = ceil_div(this->plane(), kLanes);
    image = group / per_image;
    const int64_t v0 = vectors * (group % per_image) / per_image, v1 = vectors * (group % per_image + 1) / per_image;
    start = v0 * kLanes;
    tile_count = cut_tiles(v1 - v0, Simd<T>::kVectors, kLanes, tiles);
    // The image's last tile moves back so as not to read past its end.
    Tile& last = tiles[tile_count - 1];
    const int64_t over = start + last.column + int64_t(last.vectors) * kLanes - this->plane();
    if (over > 0) last = {last.column - over, last.vectors, int32_t(over)};
  }

  Lowered<T> lower(int64_t k0, int64_t, void*, int32_t*) const {
    const T* x = static_cast<const T*>(a.x) + (image * a.geometry.channels + k0) * this->plane() + start;
    return {reinterpret_cast<const char*>(x), this->plane() * int64_t(sizeof(T)), nullptr};
  }

  Piece piece(int tile) const {
    const Tile& t = tiles[tile];
    return {t.first_lane, t.vectors * kLanes - t.first_lane,
            image * a.n * this->plane() + start + t.column + t.first_lane};
  }
  void write(int tile, const T* acc, int64_t row, int64_t rows) const {
    const Piece p = piece(tile);
    this->write_pieces(&p, 1, acc, row, rows);
  }
  void read_output(int tile, int64_t row, int64_t rows, T* out) const {
    const Piece p = piece(tile);
    this->read_pieces(&p, 1, row, rows, out);
  }
};

// Any convolution. Input rows are copied once per horizontal tap (Cho & Brand 2017, "MEC", arXiv 1706.06873): with the
// horizontal shift, stride and padding resolved by the copy, a vertical tap is a shift by whole rows:
//
//   plane (c, phase, s):  row j, column w  =  x[c][j * stride_h + phase - pad_h][w * stride_w + s * dilation_w - pad_w]
//   tap (c, r, s) of output row h          =  plane(c, r * dilation_h % stride_h, s), row h + r * dilation_h / stride_h
//
// kw copies instead of im2col's kh * kw, and the tile of a k block is smaller by the same factor. Rows are `pitch`
// columns apart: rounded up to whole vectors where that wastes at most an eighth, exact otherwise. Small images share a
// group: rows between one image's last output row and the next image are computed and dropped.
template <class IO>
struct ConvColumns : PixelColumns<IO> {
  using Base = PixelColumns<IO>;
  using T = typename Base::T;
  using Base::a, Base::kLanes, Base::tile_count, Base::tiles;
  static constexpr bool kTable = true;

  struct Layout {
    int64_t pitch, extra_rows, phases;      // phases: how many of the stride_h row phases the kernel touches
    int64_t images, rows, chunks, batches;  // a group: `images` images of `rows` output rows …
    int64_t strips, width;                  // … of `width` columns (very wide rows are cut into strips)
    int64_t taps, plane_max;                // plane_max: elements of a lowered plane
  };
  Layout l;
  int64_t image = 0, images = 0, h0 = 0, rows = 0, w0 = 0, width = 0, plane_size = 0;

  static Layout layout(const Activations& a) {
    const ConvGeometry& g = a.geometry;
    Layout l;
    const int64_t target = 4 * Simd<T>::kPanel;
    l.strips = max_of<int64_t>(1, ceil_div(g.out_w, 2 * target));
    l.width = ceil_div(g.out_w, l.strips);
    const int64_t padded = ceil_div(l.width, kLanes) * kLanes;
    l.pitch = max_of<int64_t>(1, (padded - l.width) * 8 <= padded ? padded : l.width);
    l.extra_rows = (g.kernel_h - 1) * g.dilation_h / g.stride_h;
    l.phases = 0;
    for (int64_t r = 0; r < g.kernel_h; ++r) l.phases += new_phase(g, r);
    l.taps = g.kernel_h * g.kernel_w;
    const int64_t height = max_of<int64_t>(g.out_h, 1);
    l.chunks = min_of(height, ceil_div(height * l.pitch, target));
    l.rows = ceil_div(height, l.chunks);
    l.chunks = ceil_div(height, l.rows);  // no empty chunk at the end
    l.images = 1;
    if (l.chunks == 1 && l.strips == 1)
      l.images = max_of<int64_t>(1, min_of(g.batch, target / ((height + l.extra_rows) * l.pitch)));
    l.batches = ceil_div(g.batch, l.images);
    l.plane_max = plane_elements(l, l.images, l.rows);
    return l;
  }
  static int64_t plane_elements(const Layout& l, int64_t images, int64_t rows) {
    return ceil_div(images * (rows + l.extra_rows) * l.pitch + kLanes, kLanes) * kLanes;
  }
  // Whether tap row r is the first to use its phase.
  static bool new_phase(const ConvGeometry& g, int64_t r) {
    for (int64_t q = 0; q < r; ++q)
      if ((q * g.dilation_h - r * g.dilation_h) % g.stride_h == 0) return false;
    return true;
  }
  // Position of tap row r's phase among the planes of a channel.
  static int64_t phase_index(const ConvGeometry& g, int64_t r) {
    int64_t index = 0;
    for (int64_t q = 0; q <= r; ++q) {
      if ((q * g.dilation_h - r * g.dilation_h) % g.stride_h == 0) return index;
      index += new_phase(g, q);
    }
    return index;
  }

  explicit ConvColumns(const Activations& act) : Base(act), l(layout(act)) {}

  static int64_t group_count(const Activations& a) {
    const Layout l = layout(a);
    return l.batches * l.chunks * l.strips;
  }
  static int64_t lowered_bytes(const Activations& a, int64_t k_block) {
    const Layout l = layout(a);
    const int64_t channels = min_of(a.geometry.channels, k_block / l.taps + 2);
    return (channels * l.phases * a.geometry.kernel_w * l.plane_max + line_elements(a, l)) * int64_t(sizeof(T));
  }
  // One padded input row, its columns sorted by their remainder modulo stride_w: with that, a horizontal tap is a shift.
  static int64_t line_pitch(const Activations& a, const Layout& l) {
    return l.pitch + (a.geometry.kernel_w - 1) * a.geometry.dilation_w / a.geometry.stride_w + 2 * kLanes;
  }
  static int64_t line_elements(const Activations& a, const Layout& l) {
    return (a.geometry.stride_w * line_pitch(a, l) + 15) / 16 * 16;  // planes stay aligned: a split load costs two
  }

  void begin(int64_t group) {
    const ConvGeometry& g = a.geometry;
    const int64_t strip = group % l.strips, chunk = group / l.strips % l.chunks;
    w0 = strip * l.width;
    width = min_of(l.width, g.out_w - w0);
    image = group / l.strips / l.chunks * l.images;
    images = min_of(l.images, g.batch - image);
    h0 = chunk * l.rows;
    rows = min_of(l.rows, g.out_h - h0);
    plane_size = plane_elements(l, images, rows);
    const int64_t positions = ((images - 1) * (rows + l.extra_rows) + rows) * l.pitch;
    tile_count = cut_tiles(ceil_div(positions, kLanes), Simd<T>::kVectors, kLanes, tiles);
  }

  Lowered<T> lower(int64_t k0, int64_t k1, void* scratch, int32_t* table) const {
    const ConvGeometry& g = a.geometry;
    const int64_t c0 = k0 / l.taps, c1 = ceil_div(k1, l.taps), planes = l.phases * g.kernel_w;
    T* line = static_cast<T*>(scratch);
    T* out = line + line_elements(a, l);
    for (int64_t i = 0; i < line_elements(a, l); ++i) line[i] = 0;
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t r = 0, phase = 0; r < g.kernel_h; ++r) {
        if (!new_phase(g, r)) continue;
        lower_planes(c, r * g.dilation_h % g.stride_h, line,
                     out + ((c - c0) * planes + phase * g.kernel_w) * plane_size);
        ++phase;
      }
    int64_t k = c0 * l.taps;
    for (int64_t c = c0; c < c1; ++c)
      for (int64_t r = 0; r < g.kernel_h; ++r) {
        const int64_t shift = r * g.dilation_h / g.stride_h * l.pitch;
        const int64_t first = (c - c0) * planes + phase_index(g, r) * g.kernel_w;
        for (int64_t s = 0; s < g.kernel_w; ++s, ++k)
          if (k >= k0 && k < k1) table[k - k0] = int32_t(((first + s) * plane_size + shift) * int64_t(sizeof(T)));
      }
    return {reinterpret_cast<const char*>(out), 0, table};
  }

  int pieces(int tile, Piece* out) const {
    const ConvGeometry& g = a.geometry;
    const int64_t end = tiles[tile].column + int64_t(tiles[tile].vectors) * kLanes;
    int count = 0;
    for (int64_t q = tiles[tile].column; q < end;) {
      const int64_t line = q / l.pitch, w = q % l.pitch;
      const int64_t next = min_of(end, (line + 1) * l.pitch);
      const int64_t which = line / (rows + l.extra_rows), h = line % (rows + l.extra_rows);
      if (which < images && h < rows && w < width) {
        const int64_t stop = min_of(next, line * l.pitch + width);
        const int64_t offset = (image + which) * a.n * this->plane() + (h0 + h) * g.out_w + w0 + w;
        const int32_t lane = int32_t(q - tiles[tile].column), length = int32_t(stop - q);
        Piece* last = out + count - 1;
        if (count && last->lane + last->count == lane && last->offset + last->count == offset)
          last->count += length;
        else
          out[count++] = {lane, length, offset};
      }
      q = next;
    }
    return count;
  }
  void write(int tile, const T* acc, int64_t row, int64_t n) const {
    Piece p[Simd<T>::kPanel];
    this->write_pieces(p, pieces(tile, p), acc, row, n);
  }
  void read_output(int tile, int64_t row, int64_t n, T* out) const {
    Piece p[Simd<T>::kPanel];
    this->read_pieces(p, pieces(tile, p), row, n, out);
  }

 private:
  static SLIM_INLINE void copy_in(const IO* from, int64_t count, T* to) {
    using V = typename Simd<T>::V;
    int64_t i = 0;
    if constexpr (sizeof(IO) == sizeof(T))
      for (; i + kLanes <= count; i += kLanes) store(to + i, load<V>(from + i));
    for (; i < count; ++i) to[i] = to_compute(from[i]);
  }

  // The kernel_w planes of one channel and row phase.
  void lower_planes(int64_t c, int64_t phase, T* line, T* out) const {
    using V = typename Simd<T>::V;
    const ConvGeometry& g = a.geometry;
    const int64_t pitch = line_pitch(a, l);
    // Input columns that the padded row holds, and where the first of them lies in it; the rest of it stays zero.
    const int64_t origin = w0 * g.stride_w - g.pad_w;
    const int64_t first = max_of<int64_t>(0, origin);
    const int64_t last = min_of(g.width, origin + (width - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w + 1);
    const IO* x = static_cast<const IO*>(a.x);
    for (int64_t i = 0, row = 0; i < images; ++i) {
      const IO* plane = x + ((image + i) * g.channels + c) * g.height * g.width;
      for (int64_t j = 0; j < rows + l.extra_rows; ++j, ++row) {
        const int64_t h = (h0 + j) * g.stride_h + phase - g.pad_h;
        const bool inside = h >= 0 && h < g.height;
        if (inside) {
          const IO* from = plane + h * g.width;
          if (g.stride_w == 1)
            copy_in(from + first, last - first, line + first - origin);
          else
            for (int64_t p = 0; p < g.stride_w; ++p) {
              int64_t w = first + ((p - (first - origin)) % g.stride_w + g.stride_w) % g.stride_w;
              for (T* to = line + p * pitch + (w - origin) / g.stride_w; w < last; w += g.stride_w)
                *to++ = to_compute(from[w]);
            }
        }
        // Whole vectors: what runs over the end of a row is overwritten by the next, and the plane ends in slack.
        for (int64_t s = 0; s < g.kernel_w; ++s) {
          const int64_t shift = s * g.dilation_w;  // divisions would take longer than the copy
          const T* from = line + (g.stride_w == 1 ? shift : shift % g.stride_w * pitch + shift / g.stride_w);
          T* to = out + s * plane_size + row * l.pitch;
          for (int64_t w = 0; w < l.pitch; w += kLanes) store(to + w, inside ? load<V>(from + w) : V{});
        }
      }
    }
    for (int64_t s = 0; s < g.kernel_w; ++s)
      for (int64_t i = images * (rows + l.extra_rows) * l.pitch; i < plane_size; ++i) out[s * plane_size + i] = 0;
  }
};

SLIM_INLINE int64_t align64(int64_t n) { return (n + 63) & ~int64_t(63); }

// Calls f with a value of the type that activations have in memory.
template <class F>
SLIM_INLINE auto with_dtype(DType dtype, F f) {
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::f64) return f(double{});
  return f(float{});
}

// Calls f with a null pointer of the type that turns these activations into columns.
template <class IO, class F>
SLIM_INLINE auto with_source(const Activations& a, F f) {
  if (!a.conv) return f((LinearColumns<IO>*)0);
  if constexpr (sizeof(IO) == sizeof(typename ComputeOf<IO>::type))
    if (DirectColumns<IO>::fits(a)) return f((DirectColumns<IO>*)0);
  return f((ConvColumns<IO>*)0);
}

}  // namespace
}  // namespace slim::cpu::SLIM_ISA
