// A file driver for HDF5 that changes the file in an order in which every moment is readable.
//
// HDF5 writes changed metadata sorted by address. A process that dies in between leaves, for a
// short while, an index that points to blocks not yet written, or a dataset that is longer than its
// data. This driver writes new blocks at once, because nothing refers to them yet, and holds back
// changes of existing blocks until HDF5 flushes. Then it writes the superblock (end of file), the
// index nodes from the root down, and last the object headers, which make a new frame visible.
// Where frames are removed the headers come first.

#ifndef LMP_HLGAUSS_H5MD_DRIVER_H
#define LMP_HLGAUSS_H5MD_DRIVER_H

#include <hdf5.h>
#if H5_VERSION_GE(1, 13, 0)
#include <H5FDdevelop.h>
#endif

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <new>
#include <unordered_set>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace h5md_driver {

struct OrderedFile : H5FD_t {
  int fd = -1;
  dev_t device = 0;
  ino_t inode = 0;
  haddr_t end_of_space = 0;                // what HDF5 has allocated
  haddr_t end_of_file = 0;                 // bytes on disk
  std::unordered_set<haddr_t> existing;    // metadata blocks that the file on disk may refer to
  std::unordered_set<haddr_t> fresh;       // those written since the last flush
  std::map<std::pair<int, haddr_t>, std::vector<char>> pending;    // by rank and address
};

inline int report(const char *what)
{
  H5Epush2(H5E_DEFAULT, __FILE__, __func__, __LINE__, H5E_ERR_CLS, H5E_IO, H5E_WRITEERROR, "%s: %s",
           what, std::strerror(errno));
  return -1;
}

inline OrderedFile &self(H5FD_t *file)
{
  return *static_cast<OrderedFile *>(file);
}

inline const OrderedFile &self(const H5FD_t *file)
{
  return *static_cast<const OrderedFile *>(file);
}

/// While one of these exists, datasets shrink: the headers that hide the removed frames must reach
/// the file before the index forgets their blocks, before their values are filled in, and before
/// the file ends where they begin.
struct Shrinking {
  inline static int count = 0;
  Shrinking() { count++; }
  ~Shrinking() { count--; }
  Shrinking(const Shrinking &) = delete;
  Shrinking &operator=(const Shrinking &) = delete;
};

/// Order in which changed blocks reach the file.
inline int rank_of(H5FD_mem_t type)
{
  const bool shrinking = Shrinking::count > 0;
  if (type == H5FD_MEM_SUPER) return shrinking ? 4 : 0;    // where the file ends
  if (type == H5FD_MEM_BTREE) return shrinking ? 2 : 1;
  if (type == H5FD_MEM_DRAW) return 3;
  return shrinking ? 1 : 2;
}

inline herr_t write_all(OrderedFile &file, haddr_t address, size_t size, const void *buffer)
{
  const auto *bytes = static_cast<const char *>(buffer);
  for (size_t done = 0; done < size;) {
    const ssize_t got =
        pwrite(file.fd, bytes + done, size - done, static_cast<off_t>(address + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return report("write failed");
    done += static_cast<size_t>(got);
  }
  file.end_of_file = std::max(file.end_of_file, address + size);
  return 0;
}

/// Make the file at least as long as HDF5 believes it is; what lies behind is reserved space.
inline herr_t extend(OrderedFile &file)
{
  struct stat info;
  if (fstat(file.fd, &info) != 0) return report("fstat failed");
  file.end_of_file = static_cast<haddr_t>(info.st_size);
  if (file.end_of_file >= file.end_of_space) return 0;
  if (ftruncate(file.fd, static_cast<off_t>(file.end_of_space)) != 0) return report("ftruncate");
  file.end_of_file = file.end_of_space;
  return 0;
}

inline H5FD_t *open_file(const char *name, unsigned flags, hid_t, haddr_t)
{
  int how = flags & H5F_ACC_RDWR ? O_RDWR : O_RDONLY;
  if (flags & H5F_ACC_TRUNC) how |= O_TRUNC;
  if (flags & H5F_ACC_CREAT) how |= O_CREAT;
  if (flags & H5F_ACC_EXCL) how |= O_EXCL;
  const int fd = ::open(name, how | O_CLOEXEC, 0666);
  struct stat info;
  auto *file = fd < 0 || fstat(fd, &info) != 0 ? nullptr : new (std::nothrow) OrderedFile();
  if (!file) {
    report("open failed");
    if (fd >= 0) ::close(fd);
    return nullptr;
  }
  file->fd = fd;
  file->device = info.st_dev;
  file->inode = info.st_ino;
  file->end_of_file = static_cast<haddr_t>(info.st_size);
  return file;
}

inline herr_t flush_file(H5FD_t *handle, hid_t, hbool_t)
{
  OrderedFile &file = self(handle);
  if (!file.pending.empty() && extend(file) < 0) return -1;
  for (const auto &[key, bytes] : file.pending)
    if (write_all(file, key.second, bytes.size(), bytes.data()) < 0) return -1;
  file.pending.clear();
  file.existing.merge(file.fresh);
  file.fresh.clear();
  return 0;
}

inline herr_t close_file(H5FD_t *handle)
{
  OrderedFile *file = &self(handle);
  const herr_t status = flush_file(handle, H5P_DEFAULT, true);
  ::close(file->fd);
  delete file;
  return status;
}

inline int compare_files(const H5FD_t *a, const H5FD_t *b)
{
  const auto key = [](const H5FD_t *file) {
    return std::make_pair(self(file).device, self(file).inode);
  };
  return key(a) < key(b) ? -1 : key(b) < key(a) ? 1 : 0;
}

inline herr_t query(const H5FD_t *, unsigned long *flags)
{
  // no H5FD_FEAT_ACCUMULATE_METADATA: blocks must arrive one by one, each with its type
  // (SUPPORTS_SWMR_IO: H5Fget_eoa wants it)
  if (flags)
    *flags =
        H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_AGGREGATE_SMALLDATA | H5FD_FEAT_SUPPORTS_SWMR_IO;
#ifdef H5FD_FEAT_DEFAULT_VFD_COMPATIBLE
  if (flags) *flags |= H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
#endif
  return 0;
}

inline haddr_t get_eoa(const H5FD_t *file, H5FD_mem_t)
{
  return self(file).end_of_space;
}

inline herr_t set_eoa(H5FD_t *file, H5FD_mem_t, haddr_t address)
{
  self(file).end_of_space = address;
  return 0;
}

inline haddr_t get_eof(const H5FD_t *file, H5FD_mem_t)
{
  return self(file).end_of_file;
}

inline herr_t read_file(H5FD_t *handle, H5FD_mem_t type, hid_t, haddr_t address, size_t size,
                        void *buffer)
{
  OrderedFile &file = self(handle);
  auto *bytes = static_cast<char *>(buffer);
  size_t done = 0;
  while (done < size) {
    const ssize_t got =
        pread(file.fd, bytes + done, size - done, static_cast<off_t>(address + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return report("read failed");
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  std::memset(bytes + done, 0, size - done);    // behind the end of the file
  for (const auto &[key, held] : file.pending) {
    const haddr_t first = std::max(address, key.second);
    const haddr_t last = std::min(address + size, key.second + held.size());
    if (first < last)
      std::memcpy(bytes + (first - address), held.data() + (first - key.second), last - first);
  }
  if (type != H5FD_MEM_DRAW && !file.fresh.count(address)) file.existing.insert(address);
  return 0;
}

inline herr_t write_file(H5FD_t *handle, H5FD_mem_t type, hid_t, haddr_t address, size_t size,
                         const void *buffer)
{
  OrderedFile &file = self(handle);
  if (type == H5FD_MEM_DRAW && !Shrinking::count) return write_all(file, address, size, buffer);
  try {
    if (type == H5FD_MEM_DRAW || file.existing.count(address)) {
      const auto *bytes = static_cast<const char *>(buffer);
      file.pending[{rank_of(type), address}].assign(bytes, bytes + size);
      return 0;
    }
    file.fresh.insert(address);
  } catch (const std::bad_alloc &) {
    errno = ENOMEM;
    return report("holding back a block");
  }
  return write_all(file, address, size, buffer);
}

inline herr_t truncate_file(H5FD_t *handle, hid_t, hbool_t)
{
  return extend(self(handle));
}

/// File access property list that uses this driver.
inline hid_t file_access()
{
  static const hid_t driver = [] {
    static H5FD_class_t definition = {};
#ifdef H5FD_CLASS_VERSION
    definition.version = H5FD_CLASS_VERSION;
    definition.value = static_cast<H5FD_class_value_t>(600);    // 512 to 1023: for local use
#endif
    definition.name = "lmp-hl";
    definition.maxaddr = (static_cast<haddr_t>(1) << 62) - 1;
    definition.fc_degree = H5F_CLOSE_STRONG;
    definition.open = open_file;
    definition.close = close_file;
    definition.cmp = compare_files;
    definition.query = query;
    definition.get_eoa = get_eoa;
    definition.set_eoa = set_eoa;
    definition.get_eof = get_eof;
    definition.read = read_file;
    definition.write = write_file;
    definition.flush = flush_file;
    definition.truncate = truncate_file;
    const H5FD_mem_t map[H5FD_MEM_NTYPES] = H5FD_FLMAP_DICHOTOMY;
    std::copy(std::begin(map), std::end(map), definition.fl_map);
    return H5FDregister(&definition);
  }();
  if (driver < 0) return -1;
  const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
  if (access < 0 || H5Pset_driver(access, driver, nullptr) < 0 ||
      H5Pset_fclose_degree(access, H5F_CLOSE_STRONG) < 0)
    return -1;
  return access;
}

}    // namespace h5md_driver

#endif
