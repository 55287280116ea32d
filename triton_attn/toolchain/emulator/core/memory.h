// Global and shared memory, and what may be wrong with an access: PTX ISA, Memory Consistency Model and
// State Spaces.
#pragma once
#include "machine.h"

// ---- global memory

inline u8* Machine::global(Warp& w, const GlobalAccess& a) {
  auto holds = [&](const Region& r) { return a.address >= r.base && a.address + a.bytes <= r.base + r.bytes; };
  if (!last_region || !holds(*last_region)) {
    const Region* end = launch.regions + launch.num_regions;
    const Region* r =
        std::upper_bound(launch.regions, end, a.address, [](u64 at, const Region& r) { return at < r.base; });
    if (r == launch.regions || !holds(*--r)) {
      report(GLOBAL_BOUNDS, a.pc, w.id, a.lane, a.address, -1, "%u bytes", a.bytes);
      return nullptr;
    }
    last_region = r;
  }
  const Region& r = *last_region;
  if (r.reachable)
    for (u32 i = 0; i < a.bytes; i++)
      if (!r.reachable[a.address + i - r.base]) {
        report(GLOBAL_BOUNDS, a.pc, w.id, a.lane, a.address + i, -1, "between the elements of a view");
        return nullptr;
      }
  if (!reads_only(a.kind) && !r.writable) {
    report(READ_ONLY, a.pc, w.id, a.lane, a.address, -1, "%u bytes", a.bytes);
    return nullptr;
  }
  if (r.writable) global_order(r, w, a);
  return (u8*)a.address;
}

// Programs of a launch run in no order: what one writes no other may read or write, unless a release and an acquire are
// between. Programs run one after another here, so this sees them all. Of a program's own warps it sees each access
// against the last one of another warp; what a barrier orders it has seen. So it does with the lanes of a warp; of those
// that store the same value any may come last.
inline void Machine::global_order(const Region& r, Warp& w, const GlobalAccess& a) {
  constexpr u32 STRONG_BIT = 0x80000000u, SEVERAL = 0x7fffffffu;
  constexpr int CLOCK_BITS = 27;
  constexpr u32 CLOCK = (1u << CLOCK_BITS) - 1;
  constexpr const char* OF_WARP = " of the same warp";
  const bool reads = reads_only(a.kind), strong = a.kind >= STRONG_LOAD;
  const u32 stamp = stamp_cta.size() - 1, by = 1u << a.lane;
  const u32 now = u32(w.id) << CLOCK_BITS | (a.issued ? a.issued : w.clock.at[w.id]);
  auto& pages = owners[&r - launch.regions];
  if (pages.empty()) pages.resize(r.bytes / PAGE + 1);
  auto unordered = [&](u32 other) {
    return other == SEVERAL || (other && stamp_cta[other] != cta && !stamp_seen[other]);
  };
  auto complain = [&](u32 i, u32 other, int other_pc, const char* what) {
    if (other == SEVERAL)
      report(PROGRAM_RACE, a.pc, w.id, a.lane, a.address + i, -1, "%s several others", what);
    else
      report(PROGRAM_RACE, a.pc, w.id, a.lane, a.address + i, other_pc, "%s program %d", what, stamp_cta[other]);
    return false;
  };
  auto race = [&](Fault kind, u32 i, int other_pc, const char* what, int other, const char* of = "") {
    report(kind, a.pc, w.id, a.lane, a.address + i, other_pc, "global memory, %s %d%s", what, other, of);
    return false;
  };
  auto here = [&](u32 other) { return other && other != SEVERAL && stamp_cta[other] == cta; };
  auto unordered_warp = [&](u32 other, u32 then) {
    int warp = then >> CLOCK_BITS;
    return here(other) && warp != w.id && (then & CLOCK) > w.clock.at[warp];
  };
  // Of the lanes of this warp that an access then was by, those that it has not waited for.
  auto unordered_lanes = [&](u32 other, u32 then, u32 lanes) {
    return here(other) && w.lanes_unordered(then >> CLOCK_BITS, then & CLOCK) ? lanes : 0;
  };
  // Of bytes alike; false after a report.
  auto order = [&](u32 i, u32 count, Owner& o) {
    const u64 at = a.address + i;
    const u32 writer = o.writer & ~STRONG_BIT, reader = o.reader & ~STRONG_BIT;
    const bool strong_write = o.writer & STRONG_BIT, strong_read = o.reader & STRONG_BIT;
    if (!(strong && strong_write) && unordered(writer))
      return complain(i, writer, o.write_pc, reads ? "reads what is written by" : "writes what is written by");
    if (!reads && !(strong && strong_read) && unordered(reader))
      return complain(i, reader, o.read_pc, "writes what is read by");
    const u32 writers = unordered_lanes(writer, o.written, o.write_lanes);
    const u32 readers = unordered_lanes(reader, o.read, o.read_lanes);
    const u32 kept = a.stored ? std::mismatch(a.stored + i, a.stored + i + count, (const u8*)at).second - (u8*)at : 0;
    const bool same = kept == count;
    const Fault after_write = reads ? RACE_READ_AFTER_WRITE : RACE_WRITE_AFTER_WRITE;
    if (!strong && !strong_write) {
      if (unordered_warp(writer, o.written))
        return race(after_write, i, o.write_pc, "written by warp", o.written >> CLOCK_BITS);
      if (reads ? writers && !(writers & by) : writers & ~by && !same)
        return race(after_write, i + kept, o.write_pc, "written by lane", only_lane(writers & ~by), OF_WARP);
    }
    if (a.kind == STORE && !strong_read) {
      if (unordered_warp(reader, o.read))
        return race(RACE_WRITE_AFTER_READ, i, o.read_pc, "read by warp", o.read >> CLOCK_BITS);
      if (readers & ~by)
        return race(RACE_WRITE_AFTER_READ, i, o.read_pc, "read by lane", only_lane(readers & ~by), OF_WARP);
    }
    if (reads) {
      const bool several = unordered(reader), weak = !strong || (!strong_read && (several || stamp_cta[reader] == cta));
      o.reader = (several ? SEVERAL : stamp) | (weak ? 0 : STRONG_BIT), o.read = now, o.read_pc = a.pc;
      o.read_lanes = readers | by;
    } else {
      o.writer = stamp | (strong ? STRONG_BIT : 0), o.written = now, o.write_pc = a.pc;
      o.write_lanes = same ? writers | by : by;
    }
    return true;
  };
  const u64 first = a.address - r.base, end = first + a.bytes;
  bool goes_on = true;
  for (u64 at = first; at < end && goes_on; at = (at / PAGE + 1) * PAGE) {
    auto& page = pages[at / PAGE];
    if (!page) page.reset(new States<Owner>(PAGE));
    const u64 start = at / PAGE * PAGE;
    page->change(at % PAGE, std::min(end, start + PAGE) - at, [&](u64 byte, u32 count, Owner& o) {
      return goes_on = order(start + byte - first, count, o);
    });
  }
}

// Release and Acquire Patterns: who acquires an address has seen what was before the releases to it that it reads from.
inline void Machine::acquire(Warp& w, u64 address) {
  const std::vector<bool>& at = released[address];
  stamp_seen.resize(stamp_cta.size());
  for (size_t i = 0; i < at.size(); i++) stamp_seen[i] = stamp_seen[i] || at[i];
  u32 own = w.clock.at[w.id];
  w.clock.join(released_to_warps[address]);
  w.clock.at[w.id] = own;
}

// A store begins another release sequence, an atomic operation is one of that it finds.
inline void Machine::release(Warp& w, u32 lanes, u64 address, bool is_store) {
  std::vector<bool>& at = released[address];
  if (is_store) at.clear(), released_to_warps[address] = Clock();
  at.resize(stamp_cta.size());
  stamp_seen.resize(stamp_cta.size());
  for (size_t i = 0; i < at.size(); i++) at[i] = at[i] || stamp_seen[i] || stamp_cta[i] == cta;
  stamp_cta.push_back(cta);
  stamp_seen.push_back(true);
  released_to_warps[address].join(w.known_to(lanes));
  w.clock.at[w.id]++;
}

// ---- local memory, from 0 on

inline u8* Machine::local(Warp& w, int pc, int lane, u64 address, u32 bytes) {
  if (address + bytes <= u64(launch.local_bytes) && address % bytes == 0)
    return &w.local[size_t(lane) * launch.local_bytes + address];
  report(UNSUPPORTED, pc, w.id, lane, 0, -1, "%u bytes at local address %lld of %d", bytes, (long long)address,
         launch.local_bytes);
  return nullptr;
}

// ---- shared memory. Offsets count from SHARED_BASE.

inline bool Machine::shared_range(Warp& w, int pc, int lane, u32 address, u32 bytes, u32 alignment) {
  if (address < SHARED_BASE || u64(address) - SHARED_BASE + bytes > u64(launch.shared_bytes)) {
    report(SHARED_BOUNDS, pc, w.id, lane, address, -1, "%u bytes at shared address %d of %d", bytes,
           int(address - SHARED_BASE), launch.shared_bytes);
    return false;
  }
  if (address % alignment) {
    report(MISALIGNED, pc, w.id, lane, address, -1, "shared address %d is no multiple of %u",
           int(address - SHARED_BASE), alignment);
    return false;
  }
  return true;
}

// Whether the writes of these bytes are over and ordered before the read. The result is a mask of unwritten bytes.
inline u32 Machine::order_read(const Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  u32 unwritten = 0;
  const u32 by = lane < 0 ? 0 : 1u << lane;
  cells.each(offset, bytes, [&](u32 at, u32 count, const Cell& c) {
    if (c.in_flight) {
      report(IN_FLIGHT, pc, w.id, std::max(lane, 0), at, c.pc, "read at shared address %u", at);
      return false;
    }
    if (!c.written) {
      unwritten |= ((1u << count) - 1) << (at - offset);
    } else if (c.clock > w.clock.at[c.writer]) {
      bool is_warp = c.writer < num_warps;
      report(RACE_READ_AFTER_WRITE, pc, w.id, std::max(lane, 0), at, c.pc, "shared address %u, written by %s %d", at,
             is_warp ? "warp" : "copies of mbarrier", is_warp ? c.writer : c.writer - num_warps);
      return false;
    } else if (by && !(c.lanes & by) && w.lanes_unordered(c.writer, c.clock)) {
      report(RACE_READ_AFTER_WRITE, pc, w.id, lane, at, c.pc, "shared address %u, written by lane %d of the same warp",
             at, only_lane(c.lanes));
      return false;
    }
    return true;
  });
  return unwritten;
}

inline void Machine::mark_read(Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  const u32 now = w.clock.at[w.id], by = lane < 0 ? 0 : 1u << lane;
  reads[w.id].change(offset, bytes, [&](u32, u32, Read& read) {
    read = {now, pc, (read.clock < w.lanes_synchronized ? 0 : read.lanes) | by};
    return true;
  });
  if (by) w.last_access[lane] = now;
}

inline u32 Machine::read_shared(Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  const u32 unwritten = order_read(w, pc, lane, offset, bytes);
  mark_read(w, pc, lane, offset, bytes);
  return unwritten;
}

// A read by the async proxy, at the time when it happens, of what was there when it was issued.
inline void Machine::read_shared_async(Warp& w, int pc, int lane, u32 offset, u32 bytes, u32 issued) {
  if (u32 unwritten = read_shared(w, pc, lane, offset, bytes))
    report(UNWRITTEN, pc, w.id, std::max(lane, 0), offset + std::countr_zero(unwritten), -1, "shared address %u",
           offset + std::countr_zero(unwritten));
  cells.each(offset, bytes, [&](u32 at, u32, const Cell& c) {
    if (!c.written) return true;
    if (c.time > issued) {
      report(OVERWRITTEN, pc, w.id, std::max(lane, 0), at, c.pc, "shared address %u", at);
      return false;
    }
    if (c.generic && c.clock > w.fenced.at[c.writer]) {
      report(PROXY_FENCE, pc, w.id, std::max(lane, 0), at, c.pc, "shared address %u, written by warp %d", at, c.writer);
      return false;
    }
    return true;
  });
}

inline void Machine::order_after_writes(const Clock& seen, Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  const u32 others = ~(1u << lane);
  cells.each(offset, bytes, [&](u32 at, u32, const Cell& c) {
    if (c.written && c.clock > seen.at[c.writer]) {
      report(RACE_WRITE_AFTER_WRITE, pc, w.id, lane, at, c.pc, "shared address %u", at);
      return false;
    }
    // Lanes of one instruction may differ: they hold one sum, each with a product of its own contracted into it. One of
    // them stays.
    if (c.written && c.time != time && c.lanes & others && w.lanes_unordered(c.writer, c.clock)) {
      report(RACE_WRITE_AFTER_WRITE, pc, w.id, lane, at, c.pc, "shared address %u, written by lane %d of the same warp",
             at, only_lane(c.lanes & others));
      return false;
    }
    return true;
  });
}

inline void Machine::order_after_reads(const Clock& seen, Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  const u32 others = ~(1u << lane);
  bool ordered = true;
  for (int k = 0; k < num_warps && ordered; k++)
    reads[k].each(offset, bytes, [&](u32 at, u32, const Read& read) {
      ordered = read.clock <= seen.at[k];
      if (!ordered)
        report(RACE_WRITE_AFTER_READ, pc, w.id, lane, at, read.pc, "shared address %u, read by warp %d", at, k);
      return ordered;
    });
  if (!ordered) return;
  reads[w.id].each(offset, bytes, [&](u32 at, u32, const Read& read) {
    if (!(read.lanes & others) || !w.lanes_unordered(w.id, read.clock)) return true;
    report(RACE_WRITE_AFTER_READ, pc, w.id, lane, at, read.pc, "shared address %u, read by lane %d of the same warp",
           at, only_lane(read.lanes & others));
    return false;
  });
}

// A write now, by someone who has seen `seen`: all earlier accesses must be in it.
inline void Machine::order_write(const Clock& seen, Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  order_after_writes(seen, w, pc, lane, offset, bytes);
  order_after_reads(seen, w, pc, lane, offset, bytes);
}

inline void Machine::mark_written(u32 offset, u32 bytes, int agent, u32 clock, int pc, bool generic, u32 lanes) {
  const Cell cell{clock, time, lanes, pc, u8(agent), 0, true, generic};
  cells.change(offset, bytes, [&](u32, u32, Cell& c) {
    const u8 in_flight = c.in_flight;
    c = cell, c.in_flight = in_flight;
    return true;
  });
}

// Nobody has written these bytes.
inline void Machine::forget(u32 offset, u32 bytes) {
  cells.change(offset, bytes, [](u32, u32, Cell& c) {
    c.written = false;
    return true;
  });
}

inline void Machine::not_in_flight(Warp& w, int pc, int lane, u32 offset, u32 bytes, const char* what) {
  cells.each(offset, bytes, [&](u32 at, u32, const Cell& c) {
    if (c.in_flight) report(IN_FLIGHT, pc, w.id, lane, at, c.pc, "%s shared address %u", what, at);
    return !c.in_flight;
  });
}

inline void Machine::write_shared(Warp& w, int pc, int lane, u32 offset, u32 bytes, const u8* data) {
  not_in_flight(w, pc, lane, offset, bytes, "write at");
  // Warps or lanes that hold the same value write it together: no fault, since whichever comes last leaves the same.
  bool same = std::memcmp(&shared[offset], data, bytes) == 0;
  if (same) cells.each(offset, bytes, [&](u32, u32, const Cell& c) { return same = c.written; });
  if (!same) order_write(w.clock, w, pc, lane, offset, bytes);
  std::memcpy(&shared[offset], data, bytes);
  const u32 now = w.clock.at[w.id], by = 1u << lane;
  cells.change(offset, bytes, [&](u32, u32, Cell& c) {
    u32 lanes = same && w.lanes_unordered(c.writer, c.clock) ? c.lanes | by : by;
    c = {now, time, lanes, pc, u8(w.id), c.in_flight, true, true};
    return true;
  });
  w.last_access[lane] = now;
}

inline void Machine::start_flight(Warp& w, int pc, int lane, u32 offset, u32 bytes) {
  order_write(w.clock, w, pc, lane, offset, bytes);
  not_in_flight(w, pc, lane, offset, bytes, "another copy to");
  cells.change(offset, bytes, [&](u32, u32, Cell& c) {
    c.in_flight++, c.pc = pc;
    return true;
  });
}

inline void Machine::end_flight(u32 offset, u32 bytes) {
  cells.change(offset, bytes, [](u32, u32, Cell& c) {
    c.in_flight--;
    return true;
  });
}
