package main

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// versionInfo is the JSON form of `ringside version`.
type versionInfo struct {
	Version  string `json:"version"`            // of the module; "(devel)" for a build from a working tree without tags
	Revision string `json:"revision,omitempty"` // of the version control system
	Time     string `json:"time,omitempty"`     // of that revision
	Modified bool   `json:"modified"`           // the working tree had changes
	Go       string `json:"go"`
	OS       string `json:"os"`
	Arch     string `json:"arch"`
	CGO      bool   `json:"cgo"`
}

func newVersion() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  args(cobra.NoArgs, "none"),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		bi, ok := debug.ReadBuildInfo()
		if !ok {
			bi = &debug.BuildInfo{}
		}
		return printVersion(cmd.OutOrStdout(), versionOf(bi), *output)
	}
	return cmd
}

// versionOf extracts what bi records.
func versionOf(bi *debug.BuildInfo) versionInfo {
	v := versionInfo{Version: bi.Main.Version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	if v.Version == "" {
		v.Version = "unknown"
	}
	for _, s := range bi.Settings {
		switch s.Key {
		case "vcs.revision":
			v.Revision = s.Value
		case "vcs.time":
			v.Time = s.Value
		case "vcs.modified":
			v.Modified = s.Value == "true"
		case "CGO_ENABLED":
			v.CGO = s.Value == "1"
		}
	}
	return v
}

func printVersion(w io.Writer, v versionInfo, output string) error {
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(v)
	}
	fmt.Fprintf(w, "ringside %s, %s %s/%s", v.Version, v.Go, v.OS, v.Arch)
	if v.Revision != "" {
		fmt.Fprintf(w, ", revision %.12s of %s", v.Revision, v.Time)
		if v.Modified {
			fmt.Fprint(w, " with changes")
		}
	}
	_, err := fmt.Fprintln(w)
	return err
}
