package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ringside-rdma/ringside/internal/softnic/observe"
	"github.com/spf13/cobra"
)

// statsReport is the JSON form of `ringside stats`. Fields may be added.
type statsReport struct {
	Schema   string         `json:"schema"` // "ringside.stats/1"
	Time     time.Time      `json:"time"`
	NICs     []*observe.NIC `json:"nics"`
	Problems []string       `json:"problems"` // NICs that could not be asked, and why
}

func newStats() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "stats [flags]",
		Short: "Show the counters of software NICs, and why packets were sent again or dropped",
		Long: `stats asks the software NICs of your processes in this network namespace for their
counters: of each queue pair what was sent and received, how many packets were
sent again for which reason, and what its responder has met; of each UDP port,
and of all TCP connections of queue pairs together, the packets that were
dropped, by reason. docs/capture.md explains them.`,
		Example: "  ringside stats\n  ringside stats --watch 1s --pid 1234\n  ringside stats -o json | jq '.nics[].qps[].wire.again'",
		Args:    args(cobra.NoArgs, "none"),
	}
	output := outputFlag(cmd)
	asJSON := cmd.Flags().Bool("json", false, "the same as -o json")
	every := cmd.Flags().Duration("watch", 0, "show them again and again, with this pause, until interrupted")
	pids := cmd.Flags().IntSlice("pid", nil, "only NICs of these processes")
	gids := cmd.Flags().StringSlice("gid", nil, "only these NICs")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *every < 0 {
			return usage(cmd, errors.New("--watch: want a positive duration"))
		}
		want, err := selection(*pids, *gids)
		if err != nil {
			return usage(cmd, err)
		}
		for {
			r, err := readStats(cmd.Context(), want)
			if err != nil {
				return err
			}
			if err := r.write(cmd.OutOrStdout(), *asJSON || *output == "json"); err != nil {
				return err
			}
			if *every == 0 {
				return nil
			}
			select {
			case <-cmd.Context().Done():
				return nil
			case <-time.After(*every):
			}
		}
	}
	return cmd
}

// readStats asks the NICs that are wanted; nil: all.
func readStats(ctx context.Context, want func(*observe.Source) bool) (*statsReport, error) {
	r := &statsReport{Schema: "ringside.stats/1", Time: time.Now(), NICs: []*observe.NIC{}, Problems: []string{}}
	all, err := observe.GIDs()
	if err != nil {
		return nil, err
	}
	for _, g := range all {
		n, err := observe.ReadNIC(ctx, g)
		switch {
		case errors.Is(err, observe.ErrGone):
		case err != nil:
			r.Problems = append(r.Problems, err.Error())
		case want == nil || want(&observe.Source{GID: g, PID: n.PID}):
			r.NICs = append(r.NICs, n)
		}
	}
	slices.SortFunc(r.NICs, func(a, b *observe.NIC) int {
		if a.PID != b.PID {
			return a.PID - b.PID
		}
		return strings.Compare(a.GID, b.GID)
	})
	return r, nil
}

func (r *statsReport) write(w io.Writer, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	var b strings.Builder
	for _, n := range r.NICs {
		writeNIC(&b, n)
	}
	if len(r.NICs) == 0 {
		b.WriteString("no software NICs\n")
	}
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "problem: %s\n", p)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func writeNIC(b *strings.Builder, n *observe.NIC) {
	fmt.Fprintf(b, "%s/%d  %s, GID %s\n", n.Device, n.PID, n.Program, n.GID)
	for _, p := range n.Ports {
		if p.Path == "tcp" {
			fmt.Fprintf(b, "    TCP: %d packets sent, %d received; ended: %s%s; dropped: %s\n", p.Sent, p.Received, reasons(p.Ended), inBrackets(p.Refusal), reasons(p.Dropped))
		} else {
			fmt.Fprintf(b, "    UDP %s: %d packets sent, %d received, %d not sent%s; dropped: %s\n", p.Address, p.Sent, p.Received, p.NotSent, inBrackets(p.Refusal), reasons(p.Dropped))
		}
		writeWire(b, fmt.Sprintf("%d connections, and those that have ended", p.Conns), &p.Total)
	}
	tw := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	if len(n.QPs) > 0 {
		fmt.Fprintln(tw, "    QP\ttype\tstate\tpath\tpeer\trequests\tbytes\twaiting\treceives\tbytes\tRNR")
	}
	for i := range n.QPs {
		q := &n.QPs[i]
		peer := q.Peer
		if peer != "" {
			peer = fmt.Sprintf("%s QP %d", q.Peer, q.PeerQPN)
		}
		fmt.Fprintf(tw, "    %d\t%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%d\t%d\n", q.QPN, q.Type, q.State, dash(q.Path), dash(peer), q.Requests.Messages, q.Requests.Bytes,
			q.Waiting, q.Receives.Messages, q.Receives.Bytes, q.RNR)
	}
	tw.Flush()
	for i := range n.QPs {
		if w := n.QPs[i].Wire; w != nil {
			writeWire(b, fmt.Sprint("QP ", n.QPs[i].QPN), w)
		}
	}
	b.WriteByte('\n')
}

// writeWire writes what one connection has sent and met, or several.
func writeWire(b *strings.Builder, who string, w *observe.Wire) {
	fmt.Fprintf(b, "    %s: %d request packets sent, %d of them again (%s); %d timeouts, %d sequence NAKs, %d RNR NAKs\n", who, w.Sent, w.Resent,
		reasons(w.Again), w.Timeouts, w.SeqNAKs, w.RNRNAKs)
	fmt.Fprintf(b, "        %d received: %d duplicates, %d early, %d without a receive, %d refused (%s), %d dropped; %d answers said nothing new\n", w.Received,
		w.Duplicates, w.Early, w.NotReady, w.Refused, reasons(w.RefusedBy), w.Dropped, w.Useless)
}

func inBrackets(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// reasons writes counts by reason.
func reasons(m map[string]uint64) string {
	var s []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		s = append(s, fmt.Sprintf("%s %d", k, m[k]))
	}
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}
