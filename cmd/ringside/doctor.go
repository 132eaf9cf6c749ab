package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ringside-rdma/ringside/internal/conformance"
	"github.com/ringside-rdma/ringside/internal/remedy"
	"github.com/ringside-rdma/ringside/transport"
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
		Long: `doctor opens each of this host's RDMA devices, looks at their ports and at this
process's limits, and says what will not work and how to mend it. It changes
nothing, and takes no longer than that.

With --selftest it also runs the conformance suite, by which this library is
tested, on one device, or between two: some two hundred cases of operations and
errors, within this process and twice more with a second process, which is this
program started again; some of these are killed, as part of the test. Of the
software NIC that is its path through memory only. It takes about half a minute
on the software NIC, some minutes on a device of the kernel, and up to minutes
for each case that gets no answer; an interrupt ends it behind the case that it
is at, and the report has what came before. The device works, and its
connections fail on purpose: leave it alone meanwhile.

The report holds the version of the kernel, and names, GUIDs and addresses of
all RDMA devices and of their net devices, and, of cases that fail, what was
logged, process ids included; -o json has all of it. The exit status is 1 if the
self-test fails, and 0 whatever problems are found without it.`,
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
				if r.Devices.Choice != nil {
					o.Device = r.Devices.Choice.Device
				}
			}
			if o.Device != "" {
				r.Selftest = runSelftest(cmd.Context(), cmd.ErrOrStderr(), o)
			}
		}
		if err := r.write(cmd.OutOrStdout(), *output); err != nil {
			return err
		}
		if *selftest && r.Selftest == nil {
			return errors.New("there is no device to test")
		}
		return r.verdict()
	}
	return cmd
}

// examine looks at the host.
func examine() (*doctorReport, error) {
	devices, err := inspect(nil, false, transport.PathAny)
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
	for _, text := range problemsOf(devices) {
		problem("%s", text)
	}
	for _, d := range devices.Devices {
		for _, p := range d.Ports {
			for _, text := range ailments(p, d.NetDevs) {
				problem("%s port %d: %s", d.Name, p.Port, text)
			}
		}
	}
	r.Findings = append(r.Findings, limitFindings(devices.Devices)...)
	return r, nil
}

// subject is at the beginning of what is wrong with a device, or with a provider's search for some; the tier may follow.
var subject = regexp.MustCompile(`^((?:provider )?\S+?)(?: \([^)]*\))?: `)

// problemsOf are the problems of the search for devices and of opening them, each once. It meets each device and each provider, and so
// does the choice of a device for programs that name none, which fails for as many reasons; and what keeps one provider from looking
// for devices keeps others.
func problemsOf(r *deviceReport) []string {
	var lines []string
	for _, p := range r.Problems {
		lines = append(lines, strings.Split(p, "\n")...)
	}
	for _, d := range r.Devices {
		if d.Error != "" {
			lines = append(lines, d.Name+": "+d.Error)
		}
	}
	var causes []string
	subjects := map[string][]string{} // by cause
	for _, line := range lines {
		who, cause := "", line
		if m := subject.FindStringSubmatch(line); m != nil {
			who, cause = m[1], line[len(m[0]):]
		}
		if _, ok := subjects[cause]; !ok {
			causes = append(causes, cause)
		}
		if !slices.Contains(subjects[cause], who) {
			subjects[cause] = append(subjects[cause], who)
		}
	}
	all := []string{}
	for _, cause := range causes {
		text := cause
		if who := strings.Join(subjects[cause], ", "); who != "" {
			text = who + ": " + cause
		}
		all = append(all, text)
	}
	return all
}

// ailments are what keeps a port from being used.
func ailments(p portJSON, netDevs []string) (all []string) {
	if p.State != ib.PortActive.String() {
		all = append(all, fmt.Sprintf("it is %s: %s", p.State, remedy.PortRemedy(p.LinkLayer == ib.LinkInfiniBand.String(), netDevs)))
	}
	if len(p.GIDs) == 0 {
		all = append(all, "it has no GID: "+remedy.NoAddress(netDevs))
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
			return fmt.Errorf("the self-test of %s ended early", t.Device) // why is in the report
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
	devices := deviceReport{Devices: slices.Clone(r.Devices.Devices), Choice: r.Devices.Choice} // problems come below
	for i := range devices.Devices {
		devices.Devices[i].Error = ""
	}
	if err := devices.writeText(&b, false); err != nil {
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
