package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

// emulateConfig is what the flags of `ringside emulate` say.
type emulateConfig struct {
	devices  int
	numbered bool
	trace    string
	loss     string
	link     string
	quiet    bool
	program  []string
}

func newEmulate() *cobra.Command {
	var o emulateConfig
	cmd := &cobra.Command{
		Use:   "emulate [flags] -- PROGRAM [ARGUMENT]...",
		Short: "Run a program that finds emulated ConnectX devices",
		Long: `emulate runs a program, with all that it starts, as on a machine with ConnectX
devices: any program that uses libibverbs, or this library, or the kernel's
interface itself, unchanged. It takes neither root nor a kernel module.

The devices, mlx5_0 and so on, are emulated by this process; behind each is a
software NIC, which speaks to those of other processes, and by RoCE v2 over UDP
to other hosts. GID 0 of a device is for peers on this host that are this user's,
run by this emulate or not; the others are the addresses of this host.

What runs here is not proven to run on hardware: docs/emulate.md says what
differs. Times mean nothing.

The exit status is the program's; if it ends by a signal, so does emulate.`,
		Example: `  ringside emulate -- ibv_devinfo
  ringside emulate --devices 2 -- sh -c 'ibv_rc_pingpong -d mlx5_0 -g 0 & sleep 1; ibv_rc_pingpong -d mlx5_1 -g 0 localhost'
  ringside emulate --trace wqes.txt -- ./program`,
		RunE: func(cmd *cobra.Command, a []string) error {
			if len(a) == 0 {
				return usage(cmd, fmt.Errorf("emulate: no program given: `%s` wants one", cmd.UseLine()))
			}
			o.program = a
			return emulateProgram(cmd, &o)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows the program's name is the program's
	f.IntVar(&o.devices, "devices", 1, "how many devices there are")
	f.StringVar(&o.trace, "trace", "", "write a line for each doorbell, WQE and CQE to this `FILE`")
	f.StringVar(&o.loss, "loss", "0", "lose this share of the packets that come in over UDP, such as 1%")
	f.StringVar(&o.link, "link", "ethernet", "link layer of the devices: ethernet, or infiniband, where those of this emulate are on one subnet")
	f.BoolVar(&o.numbered, "numbered", false, "number queue pairs and keys the same in each run, as traces that are compared need it")
	f.BoolVar(&o.quiet, "quiet", false, "say nothing about calls that cannot be answered")
	return cmd
}
