// What is known of each byte of a memory. Most accesses take whole groups of bytes, whose bytes are then alike: such a
// group has one state, and one for each byte since an access took a part of it.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "numbers.h"

template <class State>
class States {
  static constexpr u32 SIZE = 16;  // bytes of a group
  struct Group {
    State all{};
    s32 place = -1;  // of its bytes in `apart`; kept for the next time when they are alike again
    bool is_split = false;
  };
  std::vector<Group> groups;
  std::vector<std::array<State, SIZE>> apart;

  std::array<State, SIZE>& split(Group& group) {
    if (group.place < 0) group.place = apart.size(), apart.emplace_back();
    if (!group.is_split) apart[group.place].fill(group.all), group.is_split = true;
    return apart[group.place];
  }

 public:
  explicit States(u64 bytes) : groups(bytes / SIZE + 1) {}

  void clear() {
    std::fill(groups.begin(), groups.end(), Group());
    apart.clear();
  }

  // Calls look(first byte, how many alike, their state) for the bytes from first on, until it returns false.
  template <class Look>
  void each(u64 first, u32 bytes, Look look) const {
    for (u64 at = first, end = first + bytes; at < end;) {
      const Group& group = groups[at / SIZE];
      const u32 count = group.is_split ? 1 : std::min<u64>(end - at, SIZE - at % SIZE);
      if (!look(at, count, group.is_split ? apart[group.place][at % SIZE] : group.all)) return;
      at += count;
    }
  }

  // The same, and `change` may change the state.
  template <class Change>
  void change(u64 first, u32 bytes, Change change) {
    for (u64 at = first, end = first + bytes; at < end;) {
      Group& group = groups[at / SIZE];
      const u32 count = std::min<u64>(end - at, SIZE - at % SIZE);
      if (count == SIZE && !group.is_split) {
        if (!change(at, SIZE, group.all)) return;
      } else {
        std::array<State, SIZE>& states = split(group);
        for (u32 i = 0; i < count; i++)
          if (!change(at + i, 1u, states[(at + i) % SIZE])) return;
        if (count == SIZE && std::all_of(states.begin() + 1, states.end(), [&](auto& s) { return s == states[0]; }))
          group.all = states[0], group.is_split = false;
      }
      at += count;
    }
  }
};
