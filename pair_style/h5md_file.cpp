// Writes H5MD 1.1 trajectories so that every finished frame survives what happens next.
//
// The file uses HDF5's oldest format (readable after the death of its writer without repair) and is
// flushed after each frame. Disk space is reserved before HDF5 touches anything, because a write
// that fails inside HDF5 leaves a file that never opens again.

#include "h5md_file.h"

#include "h5md_driver.h"
#include "h5md_objects.h"

#include <hdf5.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <fcntl.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

using namespace h5md_objects;

constexpr char TRAJECTORY[] = "/particles/trajectory";
constexpr char CREATOR[] = "lmp-hl";
constexpr int64_t SETUP_BYTES = 64 << 10;           // metadata of an empty file, and a margin
constexpr int64_t SETUP_COLUMN_BYTES = 16 << 10;    // groups, headers and links of one column
constexpr int64_t FRAME_BYTES = 64 << 10;           // margin, and new chunks of step, time and box
constexpr int64_t FRAME_COLUMN_BYTES = 8 << 10;     // B-tree nodes when one splits

/// Owns one file descriptor.
class Descriptor {
public:
  Descriptor() = default;
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor &&other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Descriptor &operator=(Descriptor &&other) noexcept
  {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Descriptor(const Descriptor &) = delete;
  Descriptor &operator=(const Descriptor &) = delete;
  ~Descriptor()
  {
    if (fd_ >= 0) ::close(fd_);
  }
  operator int() const { return fd_; }

private:
  int fd_ = -1;
};

/// A file beyond `ulimit -f` shall be an error that can be reported, not a signal that kills.
class IgnoreFileSizeSignal {
public:
  IgnoreFileSizeSignal()
  {
    struct sigaction ignore = {};
    ignore.sa_handler = SIG_IGN;
    sigaction(SIGXFSZ, &ignore, &previous_);
  }
  ~IgnoreFileSizeSignal() { sigaction(SIGXFSZ, &previous_, nullptr); }
  IgnoreFileSizeSignal(const IgnoreFileSizeSignal &) = delete;
  IgnoreFileSizeSignal &operator=(const IgnoreFileSizeSignal &) = delete;

private:
  struct sigaction previous_;
};

std::string system_reason(int code)
{
  std::string reason = std::strerror(code);
  if (code == EFBIG) reason += " (file size limit, see ulimit -f)";
  if (code == EDQUOT || code == ENOSPC) reason += " (free space, or write elsewhere)";
  return reason;
}

std::string folder_of(const std::string &path)
{
  const auto slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

std::string real_path(const std::string &path)
{
  const std::unique_ptr<char, decltype(&std::free)> resolved(realpath(path.c_str(), nullptr),
                                                             &std::free);
  return resolved ? resolved.get() : path;
}

/// One writer at a time. The lock belongs to the open file description, so that a reader that
/// closes the same file in this process does not drop it; it ends with the process.
void lock_for_writing(int fd, const std::string &path)
{
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
#ifdef F_OFD_SETLK
  const int command = F_OFD_SETLK;
#else
  const int command = F_SETLK;
#endif
  if (fcntl(fd, command, &lock) == 0) return;
  if (errno == EAGAIN || errno == EACCES)
    throw Failure(path + " is being written by another run; stop it or choose another file");
  if (errno != ENOLCK && errno != ENOSYS && errno != EOPNOTSUPP && errno != EINVAL)
    throw Failure("cannot lock " + path + ": " + system_reason(errno));
}

std::string joined(const std::vector<std::string> &words)
{
  std::string text;
  for (const auto &word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

class Writer {
public:
  Writer(const hlgauss_h5md_settings &settings, hlgauss_h5md_opened &opened) : path_(settings.path)
  {
    struct stat info;
    const bool exists = stat(path_.c_str(), &info) == 0;
    if (exists && settings.mode == HLGAUSS_H5MD_APPEND)
      append(settings, opened);
    else
      create(settings, exists, opened);
    last_step_ = opened.last_step;
  }

  void begin_frame(int64_t step, double time, int64_t num_atoms, const double *edges,
                   const double *origin)
  {
    if (broken_) throw Failure(path_ + " took no more frames after an earlier error");
    if (step <= last_step_)
      throw Failure(path_ + " ends at step " + std::to_string(last_step_) + ", a frame at step " +
                    std::to_string(step) + " cannot follow; after reset_timestep start a new file");
    now_.step = step;
    now_.time = time;
    now_.atoms = static_cast<hsize_t>(num_atoms);
    std::copy_n(edges, 9, now_.edges);
    std::copy_n(origin, 3, now_.origin);
    capacity_ = std::max(capacity_, now_.atoms);
    int64_t bytes = FRAME_BYTES;
    for (const auto &column : columns_) bytes += column.bytes(now_.atoms) + FRAME_COLUMN_BYTES;
    reserve(bytes, "the frame at step " + std::to_string(step));
  }

  void write_column(int column, const void *values)
  {
    guarded([&] { columns_.at(column).write(num_frames_, values, now_.atoms, capacity_); });
  }

  void end_frame()
  {
    guarded([&] {
      edges_.write(num_frames_, now_.edges);
      origin_.write(num_frames_, now_.origin);
      time_.write(num_frames_, &now_.time);
      step_.write(num_frames_, &now_.step);
      flush();
    });
    num_frames_++;
    last_step_ = now_.step;
  }

  void close()
  {
    if (broken_) return;
    haddr_t end = 0;
    const bool known = H5Fget_eoa(file_, &end) >= 0;
    columns_.clear();
    for (auto *series : {&step_, &time_, &edges_, &origin_}) *series = Series();
    checked(H5Fclose(file_), "closing the file");
    file_.abandon();
    // give back what was reserved and not used; a file that is a little long is no harm
    if (known && ftruncate(descriptor_, static_cast<off_t>(end)) != 0) errno = 0;
  }

private:
  std::string path_;
  Descriptor descriptor_;    // holds the lock and reserves space; HDF5 has its own
  Handle file_;
  Series step_, time_, edges_, origin_;
  std::vector<Series> columns_;
  hsize_t num_frames_ = 0;
  hsize_t capacity_ = 0;    // rows of the atom axis
  int64_t last_step_ = INT64_MIN;
  bool broken_ = false;    // a write failed inside HDF5
  struct {
    int64_t step;
    double time;
    hsize_t atoms;
    double edges[9], origin[3];
  } now_ = {};

  template <typename Action> void guarded(Action action)
  {
    if (broken_) throw Failure(path_ + " took no more frames after an earlier error");
    try {
      action();
    } catch (const Failure &failure) {
      // what HDF5 still holds in memory must not reach the file any more: the frames that were
      // flushed stay readable
      broken_ = true;
      for (auto *series : {&step_, &time_, &edges_, &origin_}) series->abandon();
      for (auto &column : columns_) column.abandon();
      file_.abandon();
      throw Failure("cannot write " + path_ + ": " + failure.what());
    }
  }

  void flush() { checked(H5Fflush(file_, H5F_SCOPE_GLOBAL), "flushing"); }

  /// Make the file system promise `bytes` after the end of the file, or fail without a trace.
  void reserve(int64_t bytes, const std::string &purpose)
  {
    haddr_t end = 0;
    checked(H5Fget_eoa(file_, &end), "end of file");
    struct stat before;
    if (fstat(descriptor_, &before) != 0) throw Failure(path_ + ": " + system_reason(errno));
    int status;
    do status = posix_fallocate(descriptor_, static_cast<off_t>(end), bytes);
    while (status == EINTR);
    if (status == 0) return;
    if (ftruncate(descriptor_, before.st_size) != 0) errno = 0;
    throw Failure("no room for " + purpose + " (" + std::to_string(bytes / 1024 + 1) + " KiB) in " +
                  path_ + ": " + system_reason(status) +
                  "; the file is closed and holds every frame before it");
  }

  static std::string author()
  {
    if (const passwd *user = getpwuid(getuid())) {
      std::string name = user->pw_gecos ? user->pw_gecos : "";
      name = name.substr(0, name.find(','));
      return name.empty() ? user->pw_name : name;
    }
    return "unknown";
  }

  static int64_t text_bytes(const hlgauss_h5md_settings &settings)
  {
    int64_t bytes = 0;
    for (int k = 0; k < settings.num_texts; k++)
      bytes += static_cast<int64_t>(std::strlen(settings.texts[k].value)) + 1024;
    return bytes;
  }

  void create(const hlgauss_h5md_settings &settings, bool exists, hlgauss_h5md_opened &opened)
  {
    if (exists && settings.mode != HLGAUSS_H5MD_OVERWRITE)
      throw Failure(path_ + " exists; add 'append' or 'overwrite' to the fix, or move it away");
    // it gets its name once it is complete, so that no moment leaves less than a file to append to
    Descriptor previous;
    if (exists) {
      path_ = real_path(path_);
      previous = Descriptor(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
      if (previous < 0) throw Failure("cannot overwrite " + path_ + ": " + system_reason(errno));
      lock_for_writing(previous, path_);
    }
    const std::string target = path_ + ".new" + std::to_string(getpid());
    descriptor_ = Descriptor(::open(target.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
    if (descriptor_ < 0) throw Failure("cannot create " + target + ": " + system_reason(errno));
    try {
      lock_for_writing(descriptor_, target);
      const Handle properties(h5md_driver::file_access(), "file driver");
      file_ = Handle(H5Fcreate(target.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, properties),
                     "creating the file");
      reserve(SETUP_BYTES + SETUP_COLUMN_BYTES * (settings.num_columns + 4) + text_bytes(settings),
              "the header");
      build(settings);
      flush();
      publish(target, exists);
    } catch (...) {
      unlink(target.c_str());
      throw;
    }
    opened = {0, 0, INT64_MIN};
  }

  /// Give the finished file its name. A file that another run has just made is not replaced.
  void publish(const std::string &target, bool replace)
  {
    if (!replace && link(target.c_str(), path_.c_str()) == 0) {
      unlink(target.c_str());
      return;
    }
    if (!replace && errno == EEXIST) throw Failure(path_ + " was made by another run just now");
    if (std::rename(target.c_str(), path_.c_str()) != 0)    // also where there are no hard links
      throw Failure("cannot create " + path_ + ": " + system_reason(errno));
  }

  void build(const hlgauss_h5md_settings &settings)
  {
    {
      const Handle h5md = create_group(file_, "h5md");
      const int version[2] = {1, 1};
      write_attribute(h5md, "version", H5T_NATIVE_INT, version, 2);
      const Handle author_group = create_group(h5md, "author");
      write_attribute(author_group, "name", author());
      const Handle creator = create_group(h5md, "creator");
      write_attribute(creator, "name", CREATOR);
      write_attribute(creator, "version", settings.creator_version);
      if (settings.length_unit[0]) {
        const Handle modules = create_group(h5md, "modules");
        const Handle units = create_group(modules, "units");
        const int units_version[2] = {1, 0};
        write_attribute(units, "version", H5T_NATIVE_INT, units_version, 2);
      }
    }
    const Handle particles = create_group(file_, "particles");
    const Handle trajectory = create_group(particles, "trajectory");
    const Handle observables = create_group(file_, "observables");
    const Handle parameters = create_group(file_, "parameters");
    write_attribute(parameters, "unit_style", settings.unit_style);
    const Handle runs = create_group(parameters, "runs");

    const Handle box = create_group(trajectory, "box");
    const int dimension = 3;
    write_attribute(box, "dimension", H5T_NATIVE_INT, &dimension, 0);
    const char *boundary[3];
    for (int k = 0; k < 3; k++) boundary[k] = settings.periodic[k] ? "periodic" : "none";
    write_attribute(box, "boundary", string_type(), boundary, 3);

    // one step and one time for all, hard-linked into every element
    const Handle edges = create_group(box, "edges");
    step_ = Series(edges, "step", HLGAUSS_H5MD_INT64, {}, false, 0);
    time_ = Series(edges, "time", HLGAUSS_H5MD_FLOAT64, {}, false, 0);
    if (settings.time_unit[0]) write_attribute(time_.id(), "unit", settings.time_unit);
    edges_ = Series(edges, "value", HLGAUSS_H5MD_FLOAT64, {3, 3}, false, 0);
    const Handle origin = create_group(box, "origin");
    origin_ = Series(origin, "value", HLGAUSS_H5MD_FLOAT64, {3}, false, 0);
    link_times(origin);
    if (settings.length_unit[0]) {
      write_attribute(edges_.id(), "unit", settings.length_unit);
      write_attribute(origin_.id(), "unit", settings.length_unit);
    }

    capacity_ = static_cast<hsize_t>(settings.num_atoms);
    for (int k = 0; k < settings.num_columns; k++) {
      const hlgauss_h5md_column &column = settings.columns[k];
      const Handle group = create_group(trajectory, column.name);
      columns_.emplace_back(group, "value", column.type, frame_shape(column, capacity_), true,
                            settings.compress);
      link_times(group);
      const hid_t value = columns_.back().id();
      if (column.unit[0]) write_attribute(value, "unit", column.unit);
      if (column.note[0]) write_attribute(value, "note", column.note);
      if (column.lammps_unit[0]) {
        write_attribute(value, "lammps_unit", column.lammps_unit);
        write_attribute(value, "lammps_factor", H5T_NATIVE_DOUBLE, &column.factor, 0);
      }
      if (column.ase_origin[0]) write_attribute(group, "ASE_ENTRY_ORIGIN", column.ase_origin);
      if (column.observable)
        checked(H5Lcreate_hard(trajectory, column.name, observables, column.name, H5P_DEFAULT,
                               H5P_DEFAULT),
                "linking an observable");
    }
    record_run(runs, settings, 0, 0);
  }

  static std::vector<hsize_t> frame_shape(const hlgauss_h5md_column &column, hsize_t atoms)
  {
    std::vector<hsize_t> shape(1, atoms);
    if (column.width > 1) shape.push_back(column.width);
    return shape;
  }

  void link_times(hid_t group) const
  {
    const std::string source = std::string(TRAJECTORY) + "/box/edges/";
    for (const char *name : {"step", "time"})
      checked(H5Lcreate_hard(file_, (source + name).c_str(), group, name, H5P_DEFAULT, H5P_DEFAULT),
              "linking step and time");
  }

  /// What wrote the frames from `first_frame` on; num_cut: frames of earlier runs it removed.
  static void record_run(hid_t runs, const hlgauss_h5md_settings &settings, int64_t first_frame,
                         int64_t num_cut)
  {
    const Handle run = create_group(runs, std::to_string(links_of(runs).size()).c_str());
    write_attribute(run, "start_step", H5T_NATIVE_INT64, &settings.start_step, 0);
    write_attribute(run, "from_restart", H5T_NATIVE_INT, &settings.from_restart, 0);
    write_attribute(run, "first_frame", H5T_NATIVE_INT64, &first_frame, 0);
    write_attribute(run, "frames_removed", H5T_NATIVE_INT64, &num_cut, 0);
    unsigned version[3];
    H5get_libversion(&version[0], &version[1], &version[2]);
    write_text(run, "hdf5_version",
               std::to_string(version[0]) + "." + std::to_string(version[1]) + "." +
                   std::to_string(version[2]));
    for (int k = 0; k < settings.num_texts; k++)
      write_text(run, settings.texts[k].name, settings.texts[k].value);
  }

  void append(const hlgauss_h5md_settings &settings, hlgauss_h5md_opened &opened)
  {
    descriptor_ = Descriptor(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
    if (descriptor_ < 0) throw Failure("cannot append to " + path_ + ": " + system_reason(errno));
    lock_for_writing(descriptor_, path_);
    const Handle properties(h5md_driver::file_access(), "file driver");
    const hid_t id = H5Fopen(path_.c_str(), H5F_ACC_RDWR, properties);
    if (id < 0)
      throw Failure("cannot append to " + path_ + ": it is no HDF5 file or it is damaged (" +
                    hdf5_reason() + ")");
    file_ = Handle(id, "opening the file");
    try {
      inspect(settings);
    } catch (const Failure &failure) {
      throw Failure("cannot append to " + path_ + ": " + failure.what());
    }

    num_frames_ = step_.num_frames();    // a frame that its writer did not finish does not count
    for (const auto *series : {&time_, &edges_, &origin_})
      num_frames_ = std::min(num_frames_, series->num_frames());
    for (const auto &column : columns_) num_frames_ = std::min(num_frames_, column.num_frames());
    std::vector<int64_t> steps(step_.num_frames());
    if (!steps.empty())
      checked(H5Dread(step_.id(), H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, steps.data()),
              "reading the steps");
    steps.resize(num_frames_);
    const auto beyond = std::upper_bound(steps.begin(), steps.end(), settings.start_step);
    const auto keep = static_cast<hsize_t>(beyond - steps.begin());
    if (keep < num_frames_ && !settings.from_restart && settings.start_step <= steps.front())
      throw Failure("cannot append to " + path_ + ": it holds steps " +
                    std::to_string(steps.front()) + " to " + std::to_string(steps.back()) +
                    ", this run starts at step " + std::to_string(settings.start_step) +
                    " without a restart file and would remove them; read the restart file, or "
                    "use 'overwrite' or another file");
    opened.num_cut = static_cast<int64_t>(num_frames_ - keep);
    opened.num_frames = static_cast<int64_t>(keep);
    opened.last_step = keep ? steps[keep - 1] : INT64_MIN;

    reserve(SETUP_BYTES + SETUP_COLUMN_BYTES * (settings.num_columns + 4) + text_bytes(settings),
            "the record of this run");
    guarded([&] {
      {
        const h5md_driver::Shrinking order;
        for (auto *series : {&step_, &time_, &edges_, &origin_}) series->cut(keep);
        for (auto &column : columns_) column.cut(keep);
        flush();
      }
      const Handle runs(H5Gopen2(file_, "/parameters/runs", H5P_DEFAULT), "runs");
      record_run(runs, settings, opened.num_frames, opened.num_cut);
      flush();
    });
    num_frames_ = keep;
  }

  /// Open every dataset of an existing file; throw unless it is exactly what `create` would make.
  void inspect(const hlgauss_h5md_settings &settings)
  {
    if (H5Lexists(file_, "/h5md", H5P_DEFAULT) <= 0) throw Failure("it is not an H5MD file");
    const Handle creator(H5Gopen2(file_, "/h5md/creator", H5P_DEFAULT), "h5md/creator");
    if (read_attribute(creator, "name") != CREATOR)
      throw Failure("it was not written by fix hlgauss/h5md");
    const Handle parameters(H5Gopen2(file_, "/parameters", H5P_DEFAULT), "parameters");
    if (read_attribute(parameters, "unit_style") != settings.unit_style)
      throw Failure("it has units " + read_attribute(parameters, "unit_style") +
                    ", this run has units " + settings.unit_style);

    const Handle trajectory(H5Gopen2(file_, TRAJECTORY, H5P_DEFAULT), TRAJECTORY);
    std::vector<std::string> found = links_of(trajectory), wanted(1, "box");
    for (int k = 0; k < settings.num_columns; k++) wanted.emplace_back(settings.columns[k].name);
    std::sort(wanted.begin(), wanted.end());
    std::sort(found.begin(), found.end());
    if (wanted != found)
      throw Failure("it has the columns [" + joined(found) + "], this fix writes [" +
                    joined(wanted) + "]");

    const Handle box(H5Gopen2(trajectory, "box", H5P_DEFAULT), "box");
    step_ = Series::open(box, "edges/step", HLGAUSS_H5MD_INT64, {}, false, "step");
    time_ = Series::open(box, "edges/time", HLGAUSS_H5MD_FLOAT64, {}, false, "time");
    edges_ = Series::open(box, "edges/value", HLGAUSS_H5MD_FLOAT64, {3, 3}, false, "box/edges");
    origin_ = Series::open(box, "origin/value", HLGAUSS_H5MD_FLOAT64, {3}, false, "box/origin");
    for (int k = 0; k < settings.num_columns; k++) {
      const hlgauss_h5md_column &column = settings.columns[k];
      const std::string label = std::string("column '") + column.name + "'";
      columns_.push_back(Series::open(trajectory, (std::string(column.name) + "/value").c_str(),
                                      column.type, frame_shape(column, 0), true, label));
      const std::string unit = read_attribute(columns_.back().id(), "unit");
      if (unit != column.unit)
        throw Failure(label + " has the unit '" + unit + "', this run gives '" + column.unit + "'");
      capacity_ = std::max(capacity_, columns_.back().num_atoms());
    }
  }
};

/// Run `action`; turn whatever it throws into text.
template <typename Action> int reported(char *error, size_t size, Action action)
{
  const IgnoreFileSizeSignal ignore;
  try {
    action();
    return 0;
  } catch (const std::exception &failure) {
    std::snprintf(error, size, "%s", failure.what());
  } catch (...) {
    std::snprintf(error, size, "unknown error");
  }
  return 1;
}

void start_library()
{
  static const bool started = [] {
    H5dont_atexit();    // what HDF5 holds after a failed write must never be flushed
    H5open();
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    return true;
  }();
  (void) started;
}

}    // namespace

int hlgauss_h5md_interface()
{
  return HLGAUSS_H5MD_INTERFACE;
}

int hlgauss_h5md_check(const char *path, int mode, char *error, size_t size)
{
  return reported(error, size, [&] {
    const std::string name = path;
    struct stat info;
    const bool exists = stat(path, &info) == 0;
    if (exists && mode == HLGAUSS_H5MD_NEW)
      throw Failure(name + " exists; add 'append' or 'overwrite' to the fix, or move it away");
    if (exists && !S_ISREG(info.st_mode)) throw Failure(name + " is not a regular file");
    if (exists && access(path, R_OK | W_OK) != 0)
      throw Failure("cannot write " + name + ": " + system_reason(errno));
    if (exists && mode == HLGAUSS_H5MD_APPEND) return;
    const std::string folder = folder_of(exists ? real_path(name) : name);
    if (access(folder.c_str(), W_OK | X_OK) != 0)
      throw Failure("cannot create " + name + ": folder " + folder + ": " + system_reason(errno));
  });
}

void *hlgauss_h5md_open(const hlgauss_h5md_settings *settings, hlgauss_h5md_opened *opened,
                        char *error, size_t size)
{
  std::unique_ptr<Writer> writer;
  reported(error, size, [&] {
    start_library();
    if (settings->compress && H5Zfilter_avail(H5Z_FILTER_DEFLATE) <= 0)
      throw Failure("this HDF5 library has no gzip compression; leave out 'compress'");
    writer = std::make_unique<Writer>(*settings, *opened);
  });
  return writer.release();
}

int hlgauss_h5md_begin_frame(void *file, int64_t step, double time, int64_t num_atoms,
                             const double *edges, const double *origin, char *error, size_t size)
{
  return reported(error, size, [&] {
    static_cast<Writer *>(file)->begin_frame(step, time, num_atoms, edges, origin);
  });
}

int hlgauss_h5md_write_column(void *file, int column, const void *values, char *error, size_t size)
{
  return reported(error, size, [&] { static_cast<Writer *>(file)->write_column(column, values); });
}

int hlgauss_h5md_end_frame(void *file, char *error, size_t size)
{
  return reported(error, size, [&] { static_cast<Writer *>(file)->end_frame(); });
}

int hlgauss_h5md_close(void *file, char *error, size_t size)
{
  const std::unique_ptr<Writer> writer(static_cast<Writer *>(file));
  return reported(error, size, [&] {
    if (writer) writer->close();
  });
}
