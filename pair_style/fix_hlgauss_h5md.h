// fix hlgauss/h5md: writes atoms and any per-atom quantity to an H5MD trajectory.
//
//   fix ID group hlgauss/h5md N file column ... [append|overwrite] [precision single|double]
//                                                [compress gzip L] [every v_name]
//
// A frame is due on every step divisible by N. With `every`, N is ignored, as after LAMMPS's
// `dump_modify every v_name`: the variable gives the next step on which one is due, and a new file
// also gets the step its run begins with.
//
// The frame on which a fix halt or a timeout ends a run is written too. Only `fix halt ... error
// hard` leaves no time for that: it throws inside the halt, so the frame is there if it was due and
// this fix stands before the halt in the input script.

#ifndef LMP_FIX_HLGAUSS_H5MD_H
#define LMP_FIX_HLGAUSS_H5MD_H

#include "fix.h"

#include <memory>
#include <string>
#include <vector>

namespace LAMMPS_NS {

class H5MDColumns;

class FixHLGaussH5MD : public Fix {
public:
  FixHLGaussH5MD(class LAMMPS *, int, char **);
  ~FixHLGaussH5MD() override;

  int setmask() override;
  void init() override;
  void setup(int) override;
  void min_setup(int) override;
  void end_of_step() override;
  void post_run() override;
  double memory_usage() override;

private:
  struct Library;    // entry points of libhlgauss_h5md.so

  int me, nprocs;
  int interval;                 // steps between frames; nevery is 1 to see a halt in any step
  std::string step_variable;    // equal-style variable that names the next step instead, or ""
  bigint next_step;             // on which a frame is due
  std::string filename, command;
  int mode, compress;
  std::unique_ptr<H5MDColumns> columns;
  std::vector<Fix *> halts;    // fix halt of this run: any of them may end it

  std::unique_ptr<Library> library;    // rank 0
  void *file;                          // rank 0
  bool opened;
  bigint last_step;       // of the last frame in the file
  bigint timeout_step;    // last step that ended with a timeout or fix halt

  std::string input_script(std::string &) const;
  void open_file();
  int find_step_variable();
  bool is_due(bigint) const;
  bigint step_after(bigint);
  void announce_halts();
  void write_frame(bool);
  void stop_if(int, const char *);
};

}    // namespace LAMMPS_NS

#endif
