package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime/debug"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ringside-rdma/ringside/internal/conformance"
	"github.com/ringside-rdma/ringside/verbs/ib"
	"github.com/spf13/cobra"
)

// doctorReport is the JSON form of `ringside doctor`. Fields may be added.
type doctorReport struct {
	Schema   string          `json:"schema"` // "ringside.doctor/1"
	Time     time.Time       `json:"time"`
	Version  versionInfo     `json:"version"`
	Kernel   string          `json:"kernel,omitempty"`
	Findings []finding       `json:"findings"`
	Devices  *deviceReport   `json:"devices"`
	Selftest *selftestReport `json:"selftest,omitempty"`
}

// A finding is something that a program on this host will meet.
type finding struct {
	Problem bool   `json:"problem"` // it does not work, or not well; otherwise good to know
	Text    string `json:"text"`    // with the remedy
}

type selftestReport struct {
	Device     string               `json:"device"`
	PeerDevice string               `json:"peer_device,omitempty"`
	Seconds    float64              `json:"seconds"`
	Passed     int                  `json:"passed"`
	Failed     int                  `json:"failed"`
	Skipped    int                  `json:"skipped"`
	Error      string               `json:"error,omitempty"` // why the suite ended early
	Results    []conformance.Result `json:"results"`
}

func newDoctor() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what keeps RDMA from working here, and test a device",
		Long: `doctor looks at this host's RDMA devices, ports and limits, and says what will
not work and how to mend it.

With --selftest it also runs the conformance suite, by which this library is
tested, on a device: some hundreds of operations and errors between two queue
pairs, within a process and between two, each way. The report (-o json has all
of it) says what of the device was tested; it holds addresses and GUIDs of the
device, but nothing else of the host's.`,
		Example: "  ringside doctor\n  ringside doctor --selftest --device mlx5_0 -o json > report.json\n" +
			"  ringside doctor --selftest --device mlx5_0 --peer-device mlx5_1 # cabled to each other\n  ringside doctor --selftest --run '^rc/'",
		Args: args(cobra.NoArgs, "none"),
	}
	output := outputFlag(cmd)
	selftest := cmd.Flags().Bool("selftest", false, "run the conformance suite on the device")
	var o conformance.Options
	cmd.Flags().StringVarP(&o.Device, "device", "d", "", "device to test (default: the one that programs get)")
	cmd.Flags().StringVar(&o.PeerDevice, "peer-device", "", "device of the second side (default: the same)")
	cmd.Flags().Uint64Var(&o.Seed, "seed", 0, "seed of the random cases (default: a new one)")
	only := cmd.Flags().String("run", "", "only the cases whose name matches this regular expression")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *only != "" {
			re, err := regexp.Compile(*only)
			if err != nil {
				return usage(cmd, fmt.Errorf("--run: %w", err))
			}
			o.Only = re
		}
		r, err := examine()
		if err != nil {
			return err
		}
		if *selftest {
			if o.Device == "" {
				if r.Devices.Choice == nil {
					return fmt.Errorf("there is no device to test: %s", strings.Join(r.Devices.Problems, "; "))
				}
				o.Device = r.Devices.Choice.Device
			}
			r.Selftest = runSelftest(cmd.Context(), cmd.ErrOrStderr(), o)
		}
		if err := r.write(cmd.OutOrStdout(), *output); err != nil {
			return err
		}
		return r.verdict()
	}
	return cmd
}

// examine looks at the host.
func examine() (*doctorReport, error) {
	devices, err := inspect(nil)
	if err != nil {
		return nil, err
	}
	bi, ok := debug.ReadBuildInfo()
	if !ok {
		bi = &debug.BuildInfo{}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	r := &doctorReport{Schema: "ringside.doctor/1", Time: time.Now().UTC(), Version: versionOf(bi), Kernel: strings.TrimSpace(string(kernel)),
		Devices: devices, Findings: []finding{}}
	problem := func(format string, a ...any) {
		r.Findings = append(r.Findings, finding{true, fmt.Sprintf(format, a...)})
	}
	for _, p := range devices.Problems {
		problem("%s", p)
	}
	real := false
	for i := range devices.Devices {
		d := &devices.Devices[i]
		real = real || d.Provider != "soft"
		if d.Error != "" {
			problem("%s: %s", d.Name, d.Error)
		}
		for _, p := range d.Ports {
			for _, text := range ailments(p) {
				problem("%s port %d: %s", d.Name, p.Port, text)
			}
		}
	}
	r.Findings = append(r.Findings, limitFindings(real)...)
	return r, nil
}

// ailments are what keeps a port from being used.
func ailments(p portJSON) (all []string) {
	if p.State != ib.PortActive.String() {
		all = append(all, fmt.Sprintf("it is %s: plug in the cable, or take the net device up (`ip link set DEV up`); on InfiniBand, run a subnet manager", p.State))
	}
	if len(p.GIDs) == 0 {
		all = append(all, "it has no GID: give its net device an IP address")
	}
	return all
}

// runSelftest runs the suite, with progress on a terminal.
func runSelftest(ctx context.Context, stderr io.Writer, o conformance.Options) *selftestReport {
	r := &selftestReport{Device: o.Device, PeerDevice: o.PeerDevice, Results: []conformance.Result{}}
	start, show := time.Now(), isTerminal(stderr)
	err := conformance.Run(ctx, o, func(res conformance.Result) {
		r.Results = append(r.Results, res)
		switch res.Outcome {
		case conformance.Passed:
			r.Passed++
		case conformance.Failed:
			r.Failed++
		case conformance.Skipped:
			r.Skipped++
		}
		if show {
			fmt.Fprintf(stderr, "\r\x1b[K%d cases, %d failed: %s, %s", len(r.Results), r.Failed, res.Path, res.Case)
		}
	})
	if show {
		fmt.Fprint(stderr, "\r\x1b[K")
	}
	if r.Seconds = time.Since(start).Seconds(); err != nil {
		r.Error = err.Error()
	}
	return r
}

// verdict is an error if something is wrong.
func (r *doctorReport) verdict() error {
	if t := r.Selftest; t != nil {
		switch {
		case t.Error != "":
			return fmt.Errorf("the self-test of %s ended early: %s", t.Device, t.Error)
		case t.Failed > 0:
			return fmt.Errorf("the self-test of %s: %d of %d cases failed", t.Device, t.Failed, t.Failed+t.Passed)
		case t.Passed == 0:
			return fmt.Errorf("the self-test of %s: no case was run", t.Device)
		}
	}
	return nil
}

func (r *doctorReport) write(w io.Writer, output string) error {
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	var b strings.Builder
	printVersion(&b, r.Version, "text")
	if r.Kernel != "" {
		fmt.Fprintf(&b, "kernel %s\n", r.Kernel)
	}
	b.WriteByte('\n')
	if err := r.Devices.writeText(&b, false); err != nil {
		return err
	}
	b.WriteByte('\n')
	problems := 0
	for _, f := range r.Findings {
		if f.Problem {
			problems++
			fmt.Fprintf(&b, "problem: %s\n", f.Text)
		}
	}
	for _, f := range r.Findings {
		if !f.Problem {
			fmt.Fprintf(&b, "note: %s\n", f.Text)
		}
	}
	if problems == 0 {
		b.WriteString("no problems found\n")
	}
	if r.Selftest != nil {
		r.Selftest.writeText(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (t *selftestReport) writeText(b *strings.Builder) {
	fmt.Fprintf(b, "\nself-test of %s", t.Device)
	if t.PeerDevice != "" {
		fmt.Fprintf(b, " and %s", t.PeerDevice)
	}
	fmt.Fprintf(b, ": %d passed, %d failed, %d skipped, in %.1f s\n", t.Passed, t.Failed, t.Skipped, t.Seconds)
	if t.Error != "" {
		fmt.Fprintf(b, "  ended early: %s\n", t.Error)
	}
	for _, res := range t.Results {
		if res.Outcome != conformance.Failed {
			continue
		}
		fmt.Fprintf(b, "  FAILED %s, %s\n", res.Case, res.Path)
		for line := range strings.Lines(res.Log) {
			b.WriteString("    " + line)
		}
	}
	tw := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	for _, s := range skipReasons(t.Results) {
		fmt.Fprintf(tw, "  %d skipped:\t%s\n", s.n, s.reason)
	}
	tw.Flush()
}

type skipReason struct {
	reason string
	n      int
}

// skipReasons counts the cases that were skipped by the reason, in the order in which these were first given.
func skipReasons(results []conformance.Result) (all []skipReason) {
	at := map[string]int{}
	for _, res := range results {
		if res.Outcome != conformance.Skipped || res.Reason == "" {
			continue
		}
		i, ok := at[res.Reason]
		if !ok {
			i = len(all)
			at[res.Reason] = i
			all = append(all, skipReason{reason: res.Reason})
		}
		all[i].n++
	}
	return all
}
