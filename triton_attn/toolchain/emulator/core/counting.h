// What a launch costs beside time, by instruction: sectors of global memory, wavefronts of shared memory, FLOP.
#pragma once
#include "asynchronous.h"

constexpr u32 SECTOR = 32;  // bytes; what an L1 or L2 cache and DRAM move at least
constexpr u32 BANKS = 32, BANK_BYTES = 4;

// ---- global memory. A request is what one instruction of a warp asks for.

struct SectorBytes {  // which bytes of a sector
  u64 sector;
  u32 bytes;
};

inline void Machine::touch(u64 address, u32 bytes, bool reads, bool writes) {
  const Region* end = launch.regions + launch.num_regions;
  const Region* r = std::upper_bound(launch.regions, end, address, [](u64 a, const Region& r) { return a < r.base; });
  if (r-- == launch.regions || address + bytes > r->base + r->bytes) return;  // a fault, reported elsewhere
  std::vector<u8>& of_region = touched[r - launch.regions];
  u64 first = r->base / SECTOR;
  if (of_region.empty()) of_region.resize((r->base + r->bytes - 1) / SECTOR - first + 1);
  s64* traffic = launch.traffic + 2 * (r - launch.regions);
  for (u64 sector = address / SECTOR; sector <= (address + bytes - 1) / SECTOR; sector++) {
    u8& before = of_region[sector - first];
    u8 now = before | (reads ? 1 : 0) | (writes ? 2 : 0);
    traffic[0] += (now & ~before) & 1, traffic[1] += (now & ~before) >> 1;
    before = now;
  }
}

// Runs of bytes of one request: the sectors that they lie in, and how many would do for as many different bytes.
struct Request {
  std::vector<SectorBytes> sectors;

  void add(u64 address, u32 bytes) {
    for (u64 end = address + bytes; address < end;) {
      u32 from = address % SECTOR, count = std::min<u64>(SECTOR - from, end - address);
      u32 mask = (count == SECTOR ? ~0u : (1u << count) - 1) << from;
      if (sectors.empty() || sectors.back().sector != address / SECTOR)
        sectors.push_back({address / SECTOR, mask});
      else
        sectors.back().bytes |= mask;
      address += count;
    }
  }

  void count(Counts& counts) {
    auto before = [](const SectorBytes& a, const SectorBytes& b) { return a.sector < b.sector; };
    if (!std::is_sorted(sectors.begin(), sectors.end(), before)) std::sort(sectors.begin(), sectors.end(), before);
    u64 bytes = 0, number = 0;
    for (size_t i = 0; i < sectors.size(); number++) {
      u32 mask = 0;
      for (u64 sector = sectors[i].sector; i < sectors.size() && sectors[i].sector == sector; i++)
        mask |= sectors[i].bytes;
      bytes += std::popcount(mask);
    }
    counts.bytes += bytes, counts.sectors += number, counts.least_sectors += (bytes + SECTOR - 1) / SECTOR;
  }
};

// `at(lane)` is the address of `bytes(lane)` bytes.
template <class At, class Bytes>
void Machine::count_global(int pc, u32 mask, At at, Bytes bytes, bool reads, bool writes) {
  Request request;
  for (; mask; mask &= mask - 1) {
    int lane = std::countr_zero(mask);
    if (!bytes(lane)) continue;
    request.add(at(lane), bytes(lane));
    touch(at(lane), bytes(lane), reads, writes);
  }
  request.count(launch.counts[pc]);
}

// ---- shared memory: CUDA C++ Programming Guide, Shared Memory of compute capability 5.x and later. 32 lanes that access
// up to 4 bytes each, 16 of 8 bytes and 8 of 16 bytes are served together, in a wavefront for each of the words that
// they want of one bank. That phases which want the same words may share a wavefront is left out.

// `at(i)` for i < accesses (a lane's, or a row's of a matrix) is where `bytes` bytes begin.
template <class At>
void Machine::count_shared(int pc, int accesses, u32 mask, At at, u32 bytes) {
  const int together = std::min<u32>(LANES, BANKS * BANK_BYTES / std::max(bytes, BANK_BYTES));
  for (int first = 0; first < accesses; first += together) {
    u32 words[BANKS], number = 0;
    u8 of_bank[BANKS] = {}, most = 0;
    for (int i = first; i < std::min(first + together, accesses); i++) {
      if (!(mask >> i & 1)) continue;
      for (u32 word = at(i) / BANK_BYTES; word <= (at(i) + bytes - 1) / BANK_BYTES && number < BANKS; word++) {
        if (std::find(words, words + number, word) != words + number) continue;
        words[number++] = word;
        most = std::max(most, ++of_bank[word % BANKS]);
      }
    }
    launch.counts[pc].wavefronts += most, launch.counts[pc].least_wavefronts += most > 0;
  }
}

// Of a wgmma: matrices of 8 rows of 16 bytes, each warp its 16 rows of A, the first of four those of B.
inline void Machine::count_operand(int pc, u64 descriptor, int first, int last, int bytes, bool transposed) {
  MatrixDescriptor d(descriptor);
  const int depth = 32 / bytes, step = 16 / bytes;
  for (int i = first; i < last; i += transposed ? step : 8)
    for (int k = 0; k < depth; k += transposed ? 8 : step) {
      auto at = [&](int n) { return transposed ? d.address(i, k + n, bytes, true) : d.address(i + n, k, bytes, false); };
      count_shared(pc, 8, 0xff, at, 16);
    }
}
