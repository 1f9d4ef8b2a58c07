// Memory that stays with a thread: mapping and clearing pages at each call would take a fifth of a long one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace qg {

inline int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// A buffer of this thread, with what the last one left in it; null if there is no memory.
template <int WHICH>
inline void* scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    free(buffer.data);
    buffer.size = size_t(round_up(int64_t(bytes), 4096));
    buffer.data = aligned_alloc(64, buffer.size);
    if (!buffer.data) buffer.size = 0;
  }
  return buffer.data;
}

// What the arrays of one call take together, to be kept for the next one: a gigantic call gives its memory back.
constexpr size_t KEEP_BYTES = 64 << 20;

// The arrays of a call, one after the other in one piece of memory. It is as large as the calls before needed; what
// does not fit is allocated for itself.
class Stack {
  char* data = nullptr;
  size_t size = 0, used = 0, taken = 0, most = 0;

 public:
  ~Stack() { free(data); }

  void* take(size_t bytes) {
    most = std::max(most, taken += bytes);
    if (used + bytes > size) return aligned_alloc(64, bytes);
    used += bytes;
    return data + used - bytes;
  }

  // In the opposite order.
  void give_back(void* array, size_t bytes) {
    if (array >= data && array < data + size) used -= bytes;
    else free(array);
    if (taken -= bytes) return;
    if (most > size && most <= KEEP_BYTES) {
      free(data);
      data = (char*)aligned_alloc(64, most);
      size = data ? most : 0;
    }
    most = 0;
  }

  static Stack& of_thread() {
    static thread_local Stack stack;
    return stack;
  }
};

// An array for the time of a call; `data` is null if there is no memory.
template <class E>
struct Memory {
  size_t bytes;
  E* data;
  explicit Memory(int64_t count)
      : bytes(size_t(round_up(std::max<int64_t>(count, 1) * sizeof(E), 64))),
        data((E*)Stack::of_thread().take(bytes)) {}
  Memory(const Memory&) = delete;
  ~Memory() { Stack::of_thread().give_back(data, bytes); }
};

}  // namespace qg
